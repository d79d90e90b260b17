"""Table 5 and Figure 1: the posterior without one of four parts of the layers, or of fewer in smaller models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from bmoe_lightning.metrics import get_metric, new_figure
from bmoe_lightning.report import Cell, Grid, GridBlock, GridRow, NumberFormat, method_styles
from recipes.common.report_parts import NamedFigure, Section
from recipes.paper.report.section import ReportInput, cell_of, counts, layout_format, layout_title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TITLE = "Which layers matter (Table 5 and Figure 1)"
_METRICS = ("nll", "ece")
_CHANGE = NumberFormat(digits=1, scale=100, signed=True)


def section(report: ReportInput) -> Section | None:
    """Metrics without each part of the layers, and their change relative to all layers; None if not asked for.

    Args:
        report: What the report is made from.
    """
    with_table, with_figure = 5 in report.study.tables, 1 in report.study.figures
    if not (with_table or with_figure):
        return None
    found = {name: parts for name in report.study.labels if (parts := _parts(report, name))}
    if not found:
        return Section(_TITLE, text=("Left out, since the study has no results without a part of the layers.",))
    grid = Grid(
        "layers",
        f"{report.model}: the posterior without a part of the layers, which then keep their trained weights, "
        "and the change relative to all layers. "
        + counts([report.label(name) for name in found], [report.groups(name, name) for name in found]),
        "layers",
        tuple(title for name in _METRICS for title in (layout_title(get_metric(name)), f"{_title(name)} change (%)")),
        tuple(_block(report, name, parts) for name, parts in found.items()),
    )
    changes = {report.label(name): _changes(report, name, parts) for name, parts in found.items()}
    figure = NamedFigure(
        "layers",
        "Relative change of test NLL and ECE without a part of the layers; bars: standard deviation over seeds.",
        lambda: change_figure(changes),
    )
    return Section(_TITLE, grids=(grid,) if with_table else (), figures=(figure,) if with_figure else ())


def relative_change(without: Cell, whole: Cell) -> Cell | None:
    """The change of a metric relative to all layers, over the seeds that both have; None if they share none.

    Args:
        without: The metric without some layers.
        whole: The metric with all layers.
    """
    ours, others = (dict(zip(cell.seeds, cell.values, strict=True)) for cell in (without, whole))
    seeds = [seed for seed in without.seeds if seed in others]
    # Relative to an error of zero nothing can be said.
    values = [ours[seed] / others[seed] - 1 if others[seed] else math.nan for seed in seeds]
    return Cell.of(values, seeds) if seeds else None


def change_figure(changes: Mapping[str, Mapping[str, Mapping[int, Cell]]]) -> Figure:
    """The change of each metric over the part of the layers that is left out, a line a data set.

    Args:
        changes: For each data set and metric, the relative change without each part.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    figure = new_figure(4.0 * len(_METRICS) + 1.5, 3.4)
    panels = figure.subplots(1, len(_METRICS), squeeze=False)[0]
    styles = method_styles(list(changes))
    for metric, ax in zip(_METRICS, panels, strict=True):
        ax.axhline(0, color="#888888", linewidth=1, linestyle="--")
        for name, of_set in changes.items():
            cells = of_set[metric]
            ax.errorbar(
                list(cells),
                [100 * cell.mean for cell in cells.values()],
                yerr=[100 * (cell.std or 0.0) for cell in cells.values()],
                color=styles[name].color,
                marker=styles[name].marker,
                capsize=2,
                linewidth=1.2,
                label=name if metric == _METRICS[0] else None,
            )
        parts = sorted({part for of_set in changes.values() for part in of_set[metric]})
        ax.set_xticks(parts)
        ax.set(xlabel="part of the layers that is left out", ylabel=f"change of {_title(metric)} (%)")
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    return figure


def _parts(report: ReportInput, name: str) -> dict[int, str]:
    """The rows without each part, of the models of one data set, if that with all layers is there too."""
    groups = report.all_groups(name, name)
    if report.compared.layers not in groups:
        return {}
    numbered = {number: row for row in groups if (number := report.compared.without_part(row)) is not None}
    return dict(sorted(numbered.items()))


def _block(report: ReportInput, name: str, parts: Mapping[int, str]) -> GridBlock:
    groups = report.all_groups(name, name)
    changes = _changes(report, name, parts)
    specs = [get_metric(metric) for metric in _METRICS]
    nothing: list[Cell | None] = [None] * len(specs)
    rows = [(report.compared.layers, "all layers", nothing)]
    rows += [
        (row, groups[row][0].label, [changes[metric].get(number) for metric in _METRICS])
        for number, row in parts.items()
    ]
    formats = tuple(
        format for spec in specs for format in (replace(layout_format(spec), higher_is_better=None), _CHANGE)
    )
    return GridBlock(
        report.label(name),
        formats,
        tuple(
            GridRow(
                row,
                label,
                tuple(
                    cell
                    for spec, change in zip(specs, of_row, strict=True)
                    for cell in (cell_of(groups[row], spec, report.settings), change)
                ),
            )
            for row, label, of_row in rows
        ),
    )


def _changes(report: ReportInput, name: str, parts: Mapping[int, str]) -> dict[str, dict[int, Cell]]:
    """The relative change of each metric without each part."""
    groups, settings = report.all_groups(name, name), report.settings
    found: dict[str, dict[int, Cell]] = {}
    for metric in map(get_metric, _METRICS):
        whole = cell_of(groups[report.compared.layers], metric, settings)
        cells = {
            number: relative_change(cell_of(groups[row], metric, settings), whole) for number, row in parts.items()
        }
        found[metric.name] = {number: cell for number, cell in cells.items() if cell is not None}
    return found


def _title(metric: str) -> str:
    return get_metric(metric).title
