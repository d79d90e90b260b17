"""Tables 1 and 2: models tested on the data set that they were trained on."""

from __future__ import annotations

from recipes.common.report_parts import Section
from recipes.paper.report.section import ReportInput, metric_grid

NUMBERS = {1, 2}
_TITLE = "In distribution (Tables 1 and 2)"


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
    caption = f"{report.model}: trained and tested on the same data set."
    grid = metric_grid(report, "in_distribution", caption, runs)
    return Section(_TITLE, grids=() if grid is None else (grid,))
