"""All metrics of the library, a table for each data set: a row a method, a column a metric."""

from __future__ import annotations

from bmoe_lightning.metrics import METRICS
from bmoe_lightning.report import Grid, GridBlock, GridRow, NumberFormat
from recipes.common.report_parts import Section
from recipes.paper.report.section import ReportInput, cell_of

_TITLE = "All metrics"


def section(report: ReportInput) -> Section | None:
    """A table for each data set in distribution, and for each that the models of the first were tested on.

    Args:
        report: What the report is made from.
    """
    home = report.study.home
    runs = [(name, name) for name in report.study.labels] + [(home, name) for name in report.shifted]
    grids = tuple(grid for trained, tested in runs if (grid := _grid(report, trained, tested)) is not None)
    if not grids:
        return None
    definitions = "\n".join(f"- {metric.title}: {metric.definition}." for metric in METRICS)
    return Section(_TITLE, linked_grids=grids, text=(definitions,))


def _grid(report: ReportInput, trained: str, tested: str) -> Grid | None:
    groups = report.groups(trained, tested)
    if not groups:
        return None
    rows = tuple(
        GridRow(row, group[0].label, tuple(cell_of(group, metric, report.settings) for metric in METRICS))
        for row, group in groups.items()
    )
    size = len(next(iter(groups.values()))[0].ids)
    return Grid(
        f"all_metrics_{trained}_{tested}",
        f"{report.model}, trained on {report.label(trained)}: the {size} test items of {report.label(tested)}.",
        "method",
        tuple(metric.header for metric in METRICS),
        (GridBlock("", tuple(NumberFormat(metric.higher_is_better) for metric in METRICS), rows),),
    )
