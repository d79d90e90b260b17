"""Drawing of reliability curves. matplotlib is optional and imported late; pyplot is not used, since it is global."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bmoe_lightning.utils.late_import import how_to_install

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from bmoe_lightning.metrics.reliability import ReliabilityCurve


def new_figure(width: float, height: float) -> Figure:
    """A new figure on the Agg canvas; the backend that the user chose is not changed.

    Args:
        width: Width in inches.
        height: Height in inches.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"drawing needs matplotlib, which is not installed; {how_to_install('plots')}"
        ) from error
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def new_axes(width: float = 4.8, height: float = 4.8) -> tuple[Figure, Axes]:
    """A new figure with one pair of axes; see `new_figure`.

    Args:
        width: Width in inches.
        height: Height in inches.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    figure = new_figure(width, height)
    return figure, figure.add_subplot()


def draw_reliability_curve(
    ax: Axes,
    curve: ReliabilityCurve,
    *,
    color: str = "#0072B2",
    marker: str = "o",
    linestyle: str = "-",
    label: str | None = None,
) -> None:
    """Draw accuracy over mean confidence with the diagonal, on equal axes from 0 to 1; empty bins are left out.

    The area of a marker grows with the share of examples in its bin, so that nearly empty bins are inconspicuous.

    Args:
        ax: Axes to draw on; they are not cleared, so that several curves overlay.
        curve: Curve to draw.
        color: Colour of line and markers.
        marker: Marker of matplotlib.
        linestyle: Line style of matplotlib.
        label: Label in the legend; None for no entry.
    """
    filled = (curve.count > 0).cpu()
    confidence = curve.confidence.cpu()[filled].tolist()
    accuracy = curve.accuracy.cpu()[filled].tolist()
    count = curve.count.cpu()[filled]
    area = (10 + 600 * count / count.sum()).tolist() if len(count) else []
    ax.plot([0, 1], [0, 1], color="#888888", linestyle="--", linewidth=1, zorder=1)
    (line,) = ax.plot(confidence, accuracy, color=color, linestyle=linestyle, linewidth=1.2, label=label, zorder=3)
    line.set(marker=marker, markersize=3)
    ax.scatter(confidence, accuracy, s=area, color=color, marker=marker, alpha=0.5, linewidths=0, zorder=2)
    ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy")
    ax.set_aspect("equal", adjustable="box")
