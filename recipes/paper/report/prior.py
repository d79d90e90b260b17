"""Tables 6 and 7: the prior precision from the evidence against that from validation."""

from __future__ import annotations

from recipes.common.report_parts import Section
from recipes.paper.report.section import ReportInput, metric_grid

NUMBERS = {6, 7}
_TITLE = "Where the prior precision is from (Tables 6 and 7)"


def section(report: ReportInput) -> Section | None:
    """The table, of the study's model; None if it was not asked for.

    Args:
        report: What the report is made from.
    """
    if not NUMBERS & set(report.study.tables):
        return None
    runs = [(name, name) for name in report.study.labels]
    if missing := report.missing(runs):
        return Section(_TITLE, text=(missing,))
    labels = report.compared.prior
    absent = [
        f"{label} on {report.label(name)}"
        for name, _ in runs
        for row, label in labels.items()
        if row not in report.groups(name, name)
    ]
    if absent:
        return Section(_TITLE, text=(f"Left out, since the study has no results of {'; '.join(absent)}.",))
    listed = " and ".join(labels.values())
    caption = f"{report.model}: {listed}; LPO finds the prior precision on validation data, LA from the evidence."
    grid = metric_grid(report, "prior", caption, runs, labels)
    return Section(_TITLE, grids=() if grid is None else (grid,))
