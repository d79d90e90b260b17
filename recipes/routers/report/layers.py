"""Random routers in some layers alone."""

from __future__ import annotations

from bmoe_lightning.metrics import get_metric
from bmoe_lightning.report import Grid, GridBlock, GridRow
from recipes.common.report_parts import Section
from recipes.paper.report.section import LAYOUT, layout_format, layout_title
from recipes.routers.methods import base_of
from recipes.routers.report.section import RouterReport, metric_cell

_TITLE = "Which layers"


def section(report: RouterReport) -> Section:
    """A block a method, a row for each choice of its layers.

    Args:
        report: What the report is made from.
    """
    groups = report.groups
    bases = [row for row in groups if any(_is_part(report, other, row) for other in groups)]
    if not bases:
        return Section(_TITLE, text=("Left out, since no method with random routers here has an option `layers`.",))
    metrics = [get_metric(name) for name in LAYOUT]
    blocks = []
    for base in bases:
        rows = [GridRow(base, "all layers", tuple(metric_cell(report, groups[base], m.name) for m in metrics))]
        for row, group in groups.items():
            if _is_part(report, row, base):
                label, indices = report.routes.selections[report.selection_of(row) or ""]
                words = f"{label} ({', '.join(map(str, indices))})"
                rows.append(GridRow(row, words, tuple(metric_cell(report, group, m.name) for m in metrics)))
        blocks.append(GridBlock(report.label(base), tuple(layout_format(m) for m in metrics), tuple(rows)))
    reference = report.known.reference
    plain = GridRow(reference, "none", tuple(metric_cell(report, groups[reference], m.name) for m in metrics))
    blocks.append(GridBlock(report.label(reference), tuple(layout_format(m) for m in metrics), (plain,)))
    caption = f"{report.given.model}: random routers in some layers alone (counted from 0), the others as trained."
    titles = tuple(layout_title(metric) for metric in metrics)
    return Section(_TITLE, grids=(Grid("router_layers", caption, "layers", titles, tuple(blocks)),))


def _is_part(report: RouterReport, row: str, base: str) -> bool:
    """Whether a row is a method on some layers alone."""
    selection = report.selection_of(row)
    return selection is not None and base_of(row, report.routes.names) == base and row == f"{base}_{selection}"
