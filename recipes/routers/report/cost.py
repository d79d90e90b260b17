"""What random routers cost: counted operations, and measured time and memory."""

from __future__ import annotations

from dataclasses import asdict, replace

from bmoe_lightning.report import Cell, Grid, GridBlock, GridRow, NumberFormat
from recipes.common.report_parts import Section
from recipes.paper.report import costs
from recipes.routers.report.section import RouterReport

_TITLE = "Cost"
_COLUMNS = ("forward passes", "added operations per pass (%)", "operations (forwards)", "stored numbers")
_FORMATS = (NumberFormat(digits=0), NumberFormat(digits=3), NumberFormat(digits=3), NumberFormat(digits=0))


def section(report: RouterReport) -> Section:
    """Counted and measured costs.

    Args:
        report: What the report is made from.
    """
    routes = report.routes
    rows = []
    for row, found in routes.counted.items():
        if row in report.groups and report.selection_of(row) is None:
            share = found.macs / routes.active_macs
            numbers = (found.passes, 100 * share, found.passes * (1 + share), found.parameters)
            rows.append(GridRow(row, report.label(row), tuple(map(Cell, numbers))))
    measured = costs.section(report.given)
    uncounted = [
        report.label(row) for row, _ in report.on_all_layers() if report.is_random(row) and row not in routes.counted
    ]
    notes = [f"Not counted: {', '.join(uncounted)}."] if uncounted else []
    if not rows:
        text = ("No method counts its operations.", *notes)
        return Section(_TITLE, text=text) if measured is None else replace(measured, text=(*measured.text, *text))
    caption = (
        f"{report.given.model}: multiply-adds of one token that random routers add to a forward pass, with sampling, "
        f"in percent of its {routes.active_macs / 1e6:,.2f} million active ones (attention scores, softmax, top K and "
        "random numbers are not counted), and the operations of a prediction in forward passes of the model. "
        "Predictions that are averaged over S routes cost S forward passes."
    )
    grid = Grid("router_operations", caption, "method", _COLUMNS, (GridBlock("", _FORMATS, tuple(rows)),))
    details = {"counted": {row: asdict(found) for row, found in routes.counted.items()}}
    if measured is None:
        return Section(_TITLE, grids=(grid,), text=tuple(notes), details=details)
    return replace(
        measured, grids=(grid, *measured.grids), text=(*notes, *measured.text), details={**measured.details, **details}
    )
