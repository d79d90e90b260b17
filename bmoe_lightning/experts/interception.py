"""Interception of expert layers while a model runs: dropout before `down_proj`, and taps behind it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from torch import nn

from bmoe_lightning.experts.layouts.registry import LAYOUTS
from bmoe_lightning.experts.threads import attached
from bmoe_lightning.experts.tied_weights import parameter_owners, tied_modules
from bmoe_lightning.experts.types import Dropout, ExpertLayer, Tap


@contextmanager
def intercepted_layers(
    model: nn.Module,
    layers: Sequence[ExpertLayer],
    *,
    taps: Sequence[Tap] | None = None,
    dropout: Dropout | None = None,
    everywhere: bool = False,
) -> Iterator[None]:
    """Drop activations before the `down_proj` of some expert layers, or pass their slots to taps.

    The model is restored afterwards, also after an exception.

    Args:
        model: The model.
        layers: Some of its expert layers.
        taps: Tap of each layer; None for no taps.
        dropout: Dropout of the input of every `down_proj`; None for no dropout.
        everywhere: Whether that applies in all threads. Otherwise it applies in this one alone, which holds the model's
            lock meanwhile.
    """

    def attach(stack: ExitStack) -> None:
        for name in dict.fromkeys(layer.layout for layer in layers):
            stack.enter_context(LAYOUTS[name].prepared(model))
        owners = parameter_owners(model)
        for layer, tap in zip(layers, itertools.repeat(None) if taps is None else taps, strict=taps is not None):
            for module in tied_modules(model, layer, owners):
                stack.enter_context(LAYOUTS[layer.layout].intercepted(module, layer, tap, dropout))

    with attached(model, attach, everywhere=everywhere):
        yield
