"""Figures of random routers: stability against noise by layer, and scores of uncertainty in and out of distribution.

They need matplotlib, but not pyplot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from bmoe_lightning.metrics import new_figure
from bmoe_lightning.report.styles import method_styles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curves = Mapping[float, Mapping[str, float]]
"""By the size of the noise and the name of the layer, a mean Jaccard index."""

_PANELS_PER_LINE = 3
_BINS = 30


def stability_figure(of_methods: Mapping[str, tuple[Curves, Mapping[str, float]]]) -> Figure:
    """The Jaccard index of chosen experts against the size of the noise, a panel a method, a line a layer.

    Lines are darker for later layers; the dashed ones are at J0, that of two draws of a random router.

    Args:
        of_methods: By the label of the method, its curves, and J0 by layer.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    figure, panels = _panels(len(of_methods))
    for (label, (curves, floor)), ax in zip(of_methods.items(), panels, strict=True):
        gammas = sorted(gamma for gamma in curves if gamma > 0)
        layers = list(floor)
        for place, layer in enumerate(layers):
            shade = str(0.75 - 0.75 * place / max(len(layers) - 1, 1))
            values = [curves[gamma][layer] for gamma in gammas]
            ax.plot(gammas, values, color=shade, marker="o", markersize=2.5, linewidth=1, label=_end(place, layers))
            ax.axhline(floor[layer], color=shade, linestyle="--", linewidth=0.7)
        ax.set(xscale="log", ylim=(0, 1.02), xlabel="size of the noise, gamma", ylabel="Jaccard index", title=label)
        ax.legend(frameon=False, fontsize=8, loc="lower left")
    return figure


def score_figure(scores: Mapping[str, Mapping[str, Tensor]]) -> Figure:
    """Histograms of scores of uncertainty, a panel a score, a line a data set.

    Args:
        scores: By the name of the score and the label of the data set, its values `[N]`; the first set is that in
            distribution.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    figure, panels = _panels(len(scores))
    styles = method_styles(list(dict.fromkeys(name for sets in scores.values() for name in sets)))
    for (name, sets), ax in zip(scores.items(), panels, strict=True):
        low = min(float(values.min()) for values in sets.values())
        high = max(float(values.max()) for values in sets.values())
        for label, values in sets.items():
            style = styles[label]
            ax.hist(
                values.double().tolist(),
                bins=_BINS,
                range=(low, high if high > low else low + 1),
                density=True,
                histtype="step",
                color=style.color,
                linestyle=style.linestyle,
                label=label,
            )
        ax.set(xlabel=name, ylabel="density")
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def _panels(number: int) -> tuple[Figure, Sequence[Axes]]:
    columns = min(number, _PANELS_PER_LINE)
    lines = -(-number // columns)
    figure = new_figure(3.4 * columns, 2.9 * lines)
    grid = figure.subplots(lines, columns, squeeze=False).flatten()
    for ax in grid[number:]:
        ax.set_visible(False)
    return figure, list(grid[:number])


def _end(place: int, layers: Sequence[str]) -> str | None:
    """A legend entry for the first and the last layer alone."""
    return {0: "first layer", len(layers) - 1: "last layer"}.get(place)
