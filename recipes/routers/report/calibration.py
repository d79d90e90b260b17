"""Accuracy and calibration in distribution, with every control."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from bmoe_lightning.metrics.ece import CalibrationNorm, expected_calibration_error
from bmoe_lightning.report import Cell, Grid, GridBlock, GridRow, MethodResult, NumberFormat
from recipes.common.report_parts import Section
from recipes.paper.report.section import counts
from recipes.routers.report.section import RouterReport, cell, metric_cell

_TITLE = "Calibration in distribution"
_LOWER = NumberFormat(higher_is_better=False)


def _error(result: MethodResult, num_bins: int, norm: CalibrationNorm) -> float:
    return float(expected_calibration_error(result.log_probs, result.target, num_bins=num_bins, norm=norm))


_NORMS: tuple[tuple[str, CalibrationNorm], ...] = (("ece", "l1"), ("mce", "max"))
_ERRORS: Mapping[str, tuple[str, Callable[[MethodResult], float]]] = {
    f"{name}_{num_bins}": (f"{name.upper()}, {num_bins} bins ↓", partial(_error, num_bins=num_bins, norm=norm))
    for num_bins in (10, 15)
    for name, norm in _NORMS
}
_COLUMNS: Mapping[str, tuple[str, NumberFormat]] = {
    "acc": ("ACC ↑", NumberFormat(higher_is_better=True)),
    "nll": ("NLL ↓", _LOWER),
    **{name: (title, _LOWER) for name, (title, _) in _ERRORS.items()},
}


def section(report: RouterReport) -> Section:
    """The table, with the numbers of publications where the set-up is theirs.

    Args:
        report: What the report is made from.
    """
    rows = [
        GridRow(
            row,
            group[0].label,
            tuple(
                cell(group, _ERRORS[name][1]) if name in _ERRORS else metric_cell(report, group, name)
                for name in _COLUMNS
            ),
        )
        for row, group in report.on_all_layers()
    ]
    for place, entry in enumerate(report.published.get("calibration", ())):
        cells = tuple(Cell(entry[name]) if name in entry else None for name in _COLUMNS)
        rows.append(GridRow(f"published {place}", f"{entry['label']} (published)", cells, is_ranked=False))
    study = report.given.study
    home = report.given.label(study.home)
    caption = (
        f"{report.given.model}, trained and tested on {home}. ECE and MCE of the top label over equal-width bins "
        f"(lo, hi]: 10 bins as in the papers, 15 as elsewhere here. {counts([home], [report.groups])}"
    )
    block = GridBlock("", tuple(format for _, format in _COLUMNS.values()), tuple(rows))
    grid = Grid("calibration", caption, "method", tuple(title for title, _ in _COLUMNS.values()), (block,))
    return Section(_TITLE, grids=(grid,), text=tuple(_text(report)))


def _text(report: RouterReport) -> list[str]:
    known, groups = report.known, report.groups
    lines = [f"(a) the fine-tuned model: {report.label(known.reference)}"]
    trained = "not made"
    own = [row for row in groups if row == known.trained_name]
    lines.append(f"(b) routers trained in the same layers without noise: {report.label(own[0]) if own else trained}")
    means = [group[0].label for row, group in groups.items() if report.is_random(row) and row.endswith("_mean")]
    listed = ", ".join(means) or "of no method here"
    lines.append(f"(c) random routers at their mean: {listed}; that of untrained noise is (a)")
    lines.append(f"(d) untrained noise, its scale by validation: {report.label(known.noise)}")
    plain = [report.label(row) for row in known.plain if row in groups and row != known.reference]
    lines.append(f"(e) controls without random routers: {', '.join(plain)}")
    lines.append("(f) entropy of the predictions as a score: in the section on distribution shift")
    found = ["Controls: " + "; ".join(lines) + "."]
    if source := report.published.get("source"):
        found.append(f"Published numbers: {source}")
    return found
