"""Where the variance of predictions comes from: a map of layers x experts, and the tokens of each expert beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from bmoe_lightning.metrics import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_INCHES = 12.0
_LEAST_WIDTH, _LEAST_HEIGHT = 3.4, 2.8  # inches, of a panel with its title and of the figure with its labels
_MOST_TICKS = 12


class LayerParts(Protocol):
    """The part of one expert layer in the variance of N examples: an entry of `Attribution.layers`."""

    @property
    def index(self) -> int:
        """Index among the model's expert layers."""

    @property
    def variance(self) -> Tensor:
        """Part of each expert in the variance of each example, `[N, E]`."""

    @property
    def slots(self) -> Tensor:
        """Number of counted routed tokens, `[N, E]`."""


@dataclass(frozen=True, eq=False)
class AttributionMap:
    """Parts of the variance by layer and expert; NaN where a layer has fewer experts than another.

    Attributes:
        layers: Index of each layer.
        variance: Mean over the examples of the part of each expert, `[L, E]` float64.
        slots: Number of routed tokens of each expert in all examples, `[L, E]` float64.
    """

    layers: tuple[int, ...]
    variance: Tensor
    slots: Tensor

    @property
    def shares(self) -> Tensor:
        """Share of each layer in the mean variance, `[L]` float64; NaN if there is no variance."""
        by_layer = self.variance.nansum(1)
        return by_layer / by_layer.sum()


def attribution_map(layers: Sequence[LayerParts]) -> AttributionMap:
    """Average the parts of each layer and expert over examples.

    Args:
        layers: `Attribution.layers`, at least one, with at least one example.

    Raises:
        ValueError: If there are no layers or no examples.
    """
    if not layers or not len(layers[0].variance):
        raise ValueError("there is nothing to draw; pass the layers of an attribution with at least one example")
    experts = max(layer.variance.shape[1] for layer in layers)

    def padded(row: Tensor) -> Tensor:
        return torch.nn.functional.pad(row.double().cpu(), (0, experts - len(row)), value=torch.nan)

    return AttributionMap(
        tuple(layer.index for layer in layers),
        torch.stack([padded(layer.variance.double().mean(0)) for layer in layers]),
        torch.stack([padded(layer.slots.sum(0)) for layer in layers]),
    )


def attribution_figure(layers: Sequence[LayerParts]) -> Figure:
    """Mean variance of the centred logits by layer and expert, and the tokens of each expert beside it.

    Experts that no token was routed to are left white, and so is where a layer has fewer experts than another. The
    share of each layer in the variance stands beside its row.

    Args:
        layers: `Attribution.layers`, at least one, with at least one example.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        ValueError: If there are no layers or no examples.
    """
    found = attribution_map(layers)
    number, experts = found.variance.shape
    width = min(max(1.6 + 0.28 * experts, _LEAST_WIDTH), _MOST_INCHES / 2)
    figure = new_figure(2 * width + 1.2, max(1.4 + 0.26 * number, _LEAST_HEIGHT))
    left, right = figure.subplots(1, 2, sharey=True)
    seen = found.slots > 0
    _heat_map(figure, left, torch.where(seen, found.variance, torch.nan), "mean variance of the centred logits")
    _heat_map(figure, right, torch.where(seen, found.slots, torch.nan), "routed tokens")
    shares = found.shares.tolist()
    left.set_yticks(
        range(number), [f"{index} ({100 * share:.0f} %)" for index, share in zip(found.layers, shares, strict=True)]
    )
    left.set_ylabel("expert layer\n(share of the variance)")
    figure.suptitle(f"{len(layers[0].variance)} examples", fontsize=10)
    return figure


def _heat_map(figure: Figure, ax: Axes, values: Tensor, title: str) -> None:
    image = ax.imshow(values.tolist(), aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
    ax.set(xlabel="expert")
    ax.set_title(title, fontsize=10)
    experts = values.shape[1]
    ax.set_xticks(range(0, experts, math.ceil(experts / _MOST_TICKS)))
    figure.colorbar(image, ax=ax)
