"""Tables 3 and 4: models trained on one data set and tested on all others."""

from __future__ import annotations

from recipes.common.report_parts import Section
from recipes.paper.report.section import ReportInput, metric_grid

NUMBERS = {3, 4}
_TITLE = "Under distribution shift (Tables 3 and 4)"


def section(report: ReportInput) -> Section | None:
    """The table, of the study's model; None if it was not asked for.

    Args:
        report: What the report is made from.
    """
    if not NUMBERS & set(report.study.tables):
        return None
    runs = [(report.study.home, name) for name in report.shifted]
    if not runs:
        return Section(_TITLE, text=("Left out, since the study has no other data set than that of the training.",))
    if missing := report.missing(runs):
        return Section(_TITLE, text=(missing,))
    caption = f"{report.model}: trained on {report.label(report.study.home)}, tested on other data sets."
    grid = metric_grid(report, "shift", caption, runs)
    return Section(_TITLE, grids=() if grid is None else (grid,))
