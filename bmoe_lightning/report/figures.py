"""Figures: reliability diagrams, and test NLL against the number of labels. Needs matplotlib, but not pyplot."""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bmoe_lightning.metrics import (
    HEADLINE_METRICS,
    ReliabilityCurve,
    draw_reliability_curve,
    new_axes,
    new_figure,
    reliability_curve,
)
from bmoe_lightning.report.files import check_rows_match
from bmoe_lightning.report.results import MethodResult, Row, by_method
from bmoe_lightning.report.styles import MethodStyle, method_styles
from bmoe_lightning.utils.atomic_io import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WELL_FILLED_SHARE = 0.02
_PANELS_PER_LINE = 4
_ROWS_OF_CARD = 13


@dataclass(frozen=True)
class LabelBudgetPoint:
    """Test NLL of a method that was given a number of labels.

    Attributes:
        method: Slug.
        label: Display name.
        num_labels: Number of labels; None for all.
        median: Median test NLL in nats; a temperature fitted on ten labels can be arbitrarily bad.
        low: Lower end of its band.
        high: Upper end of its band.
    """

    method: str
    label: str
    num_labels: int | None
    median: float
    low: float
    high: float


def matplotlib_available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def pooled_curve(group: Sequence[MethodResult], row: Row) -> ReliabilityCurve:
    """Reliability curve of a method over the items of all its seeds.

    Args:
        group: Results of one method.
        row: Its row, for the bins.
    """
    log_probs = torch.cat([result.log_probs.detach().cpu().double() for result in group])
    target = torch.cat([result.target.cpu() for result in group])
    return reliability_curve(log_probs, target, num_bins=row.settings.num_bins, convention=row.settings.convention)


def well_filled(curve: ReliabilityCurve) -> ReliabilityCurve:
    """The curve without bins that hold less than 2 % of the items: their counts become zero, the other values NaN.

    The accuracy of a bin with few items is mostly noise, and lines through such bins hide those of other methods.

    Args:
        curve: Any reliability curve.
    """
    filled = curve.count >= _WELL_FILLED_SHARE * curve.count.sum()
    nan = torch.full_like(curve.count, torch.nan)
    return ReliabilityCurve(
        curve.bin_edges,
        torch.where(filled, curve.confidence, nan),
        torch.where(filled, curve.accuracy, nan),
        torch.where(filled, curve.count, torch.zeros_like(curve.count)),
    )


def reliability_figure(group: Sequence[MethodResult], row: Row, style: MethodStyle) -> Figure:
    """Reliability diagram of one method, with the number of items and the ECE in the title.

    Args:
        group: Results of one method, over its seeds.
        row: Its row.
        style: Style of the method; see `method_styles`.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    figure, ax = new_axes()
    _draw(ax, pooled_curve(group, row), style)
    ax.set_title(f"{row.label}\nn = {_items(row)}, ECE = {row.metrics['ece'].mean:.3f}", fontsize=10)
    return figure


def reliability_panels(results: Sequence[MethodResult], rows: Sequence[Row]) -> Figure:
    """Reliability diagrams of all methods side by side, with the ECE of each; the other methods are in grey behind it.

    Only well-filled bins are drawn, see `well_filled`.

    Args:
        results: What the rows were made from.
        rows: From `summarise`.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        ValueError: If rows and results do not match.
    """
    check_rows_match(results, rows)
    groups, styles = by_method(results), method_styles([row.method for row in rows])
    curves = {row.method: well_filled(pooled_curve(groups[row.method], row)) for row in rows}
    columns = min(len(rows), _PANELS_PER_LINE)
    lines = math.ceil(len(rows) / columns)
    figure = new_figure(2.4 * columns, 2.6 * lines + 0.4)
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for row, ax in zip(rows, panels, strict=False):
        for other in curves.values():
            filled = (other.count > 0).cpu()
            ax.plot(other.confidence.cpu()[filled], other.accuracy.cpu()[filled], color="#CCCCCC", linewidth=0.8)
        _draw(ax, curves[row.method], styles[row.method])
        ax.set_title(f"{row.label}\nECE {row.metrics['ece'].mean:.3f}", fontsize=9)
        ax.label_outer()
    for ax in panels[len(rows) :]:
        ax.set_visible(False)
    for ax in panels[len(rows) - columns : len(rows)]:  # the lowest ones, some above an empty place
        ax.tick_params(labelbottom=True)
        ax.set_xlabel("confidence")
    figure.suptitle(
        f"n = {_items(rows[0])}; bins with at least {100 * _WELL_FILLED_SHARE:g} % of the items", fontsize=10
    )
    return figure


def comparison_figure(rows: Sequence[Row]) -> Figure:
    """All methods from the lowest NLL to the highest: a panel a headline metric, means with their intervals.

    Args:
        rows: From `summarise`.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    metrics = sorted(HEADLINE_METRICS, key=lambda metric: metric.name != "nll")  # the one that orders comes first
    ordered = _by_nll(rows)
    figure = new_figure(2.4 * len(metrics) + 2.2, 0.28 * len(rows) + 1.3)
    panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for metric, ax in zip(metrics, panels, strict=True):
        _draw_intervals(ax, ordered, metric.name, method_styles([row.method for row in rows]))
        ax.set_title(metric.header, fontsize=10)
    panels[0].invert_yaxis()
    figure.suptitle(_best_words(ordered), fontsize=12)
    return figure


def comparison_card(rows: Sequence[Row]) -> Figure:
    """The NLL of the best methods, as large as an image card of TensorBoard, which shrinks larger ones.

    Args:
        rows: From `summarise`; the 13 with the lowest NLL are drawn.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    figure = new_figure(3.67, 1.82)
    ax = figure.add_subplot()
    ordered = _by_nll(rows)[:_ROWS_OF_CARD]
    _draw_intervals(ax, ordered, "nll", method_styles([row.method for row in rows]), scale=0.6)
    ax.tick_params(labelsize=5.2, length=2, width=0.5)
    ax.invert_yaxis()
    figure.suptitle(_best_words(ordered), fontsize=7)
    return figure


def _by_nll(rows: Sequence[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: row.metrics["nll"].mean)


def _best_words(ordered: Sequence[Row]) -> str:
    return f"Lowest NLL: {ordered[0].label} ({ordered[0].metrics['nll'].mean:.3f})"


def _draw_intervals(
    ax: Axes, ordered: Sequence[Row], metric: str, styles: Mapping[str, MethodStyle], scale: float = 1.0
) -> None:
    for place, row in enumerate(ordered):
        value, style = row.metrics[metric], styles[row.method]
        ax.plot([value.low, value.high], [place, place], color=style.color, linewidth=1.5 * scale)
        ax.plot([value.mean], [place], color=style.color, marker=style.marker, markersize=6 * scale)
    ax.grid(axis="x", color="#DDDDDD", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.set_yticks(range(len(ordered)), [row.label for row in ordered])
    for best in ax.get_yticklabels()[:1]:  # none on axes that share another's
        best.set_fontweight("bold")


def label_budget_figure(points: Sequence[LabelBudgetPoint], methods: Sequence[str]) -> Figure:
    """Test NLL against the number of labels: one line a method, with its band. Budgets are equally spaced.

    Args:
        points: Points in any order; at most one a method and budget.
        methods: All methods of the run, in the order of its table, so that each has the style of the other figures.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        ValueError: If there are no points, a method has two for one budget, or is not one of `methods`.
    """
    if not points:
        raise ValueError("there are no points to draw; pass at least one")
    styles = method_styles(methods)
    unknown = sorted({point.method for point in points} - set(styles))
    if unknown:
        raise ValueError(f"the points are of {unknown}, but the methods of the run are {list(styles)}; name them all")
    counts = sorted({point.num_labels for point in points if point.num_labels is not None})
    budgets: list[int | None] = [*counts, *([None] if any(point.num_labels is None for point in points) else [])]
    figure, ax = new_axes(8.0, 4.4)
    for method in dict.fromkeys(point.method for point in points):
        line = sorted((p for p in points if p.method == method), key=lambda p: budgets.index(p.num_labels))
        positions = [budgets.index(point.num_labels) for point in line]
        if len(set(positions)) != len(positions):
            raise ValueError(f"{method} has more than one point for a number of labels; leave one of them out")
        style = styles[method]
        ax.fill_between(positions, [p.low for p in line], [p.high for p in line], color=style.color, alpha=0.15, lw=0)
        (drawn,) = ax.plot(positions, [p.median for p in line], color=style.color, label=line[0].label)
        drawn.set(marker=style.marker, linestyle=style.linestyle)
    ax.set_xticks(range(len(budgets)), ["all" if budget is None else str(budget) for budget in budgets])
    ax.set(xlabel="labels for calibration", ylabel="test NLL (nats)")
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    return figure


def figure_image(figure: Figure) -> Tensor:
    """Pixels of a figure, `[3, H, W]` uint8.

    Args:
        figure: Figure on an Agg canvas, as those of this module are.
    """
    figure.canvas.draw()
    pixels = torch.frombuffer(bytearray(figure.canvas.buffer_rgba()), dtype=torch.uint8)  # type: ignore[attr-defined]
    width, height = figure.canvas.get_width_height()
    return pixels.view(height, width, 4)[..., :3].permute(2, 0, 1)


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG.

    Args:
        figure: Figure to write.
        path: Path of the file, in an existing folder.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_bytes(Path(path), buffer.getvalue())
    return Path(path)


def write_figures(
    output_dir: str | Path, results: Sequence[MethodResult], rows: Sequence[Row], *, each: bool = True
) -> list[Path]:
    """Write `reliability_<method>.png` for every method, `reliability.png` with all of them, and `comparison.png`.

    Args:
        output_dir: Folder, created if missing.
        results: What the rows were made from.
        rows: From `summarise`.
        each: Whether every method has a figure of its own.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        ValueError: If rows and results do not match.
    """
    check_rows_match(results, rows)
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    groups, styles = by_method(results), method_styles([row.method for row in rows])
    paths = [
        save_figure(
            reliability_figure(groups[row.method], row, styles[row.method]), folder / f"reliability_{row.method}.png"
        )
        for row in (rows if each else ())
    ]
    return [
        *paths,
        save_figure(reliability_panels(results, rows), folder / "reliability.png"),
        save_figure(comparison_figure(rows), folder / "comparison.png"),
    ]


def _draw(ax: Axes, curve: ReliabilityCurve, style: MethodStyle) -> None:
    draw_reliability_curve(ax, curve, color=style.color, marker=style.marker, linestyle=style.linestyle)


def _items(row: Row) -> str:
    return str(row.num_examples) if len(row.seeds) == 1 else f"{row.num_examples} items, {len(row.seeds)} seeds"
