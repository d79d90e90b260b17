"""Dropout on the input of every expert's second linear layer, for training and for MC dropout.

Mixture-of-experts models of transformers hold no `nn.Dropout`: switching dropout modules on does nothing. This puts it
where the method needs it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from bmoe_lightning.experts.discovery import intercepted_layers
from bmoe_lightning.experts.types import ExpertLayer


class _Dropout:
    def __init__(self, p: float, seed: int | None) -> None:
        self.p = p
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def __call__(self, hidden: Tensor, training: bool) -> Tensor:
        if self._seed is None:
            return nn.functional.dropout(hidden, self.p, training)
        generator = self._generators.get(hidden.device)
        if generator is None:
            # Each device's stream is another one, or layers on two of them would share their masks.
            seed = self._seed + 5_915_587 * len(self._generators)
            generator = self._generators[hidden.device] = torch.Generator(hidden.device).manual_seed(seed)
        keep = torch.empty_like(hidden).bernoulli_(1 - self.p, generator=generator)
        return hidden * keep / (1 - self.p)


@contextmanager
def expert_dropout(
    model: nn.Module, layers: Sequence[ExpertLayer], p: float, *, seed: int | None = None
) -> Iterator[None]:
    """Drop activations before the second linear layer of every expert; of nested ones the innermost counts.

    A model that is called from within compiled code of another function is not noticed to be compiled, and may run
    without dropout there.

    Args:
        model: the model.
        layers: its expert layers.
        p: probability that an activation is dropped, in [0, 1).
        seed: None drops in training mode only, from torch's own random stream, as `nn.Dropout` does. A seed drops in
            every mode, from a generator of its own: this is MC dropout, for predictions; where activations are
            recomputed for gradients, other ones would be dropped.

    Raises:
        ValueError: if p is outside [0, 1), or in training a compiled model would not notice.
    """
    if not 0 <= p < 1:
        raise ValueError(f"expert dropout must be in [0, 1), got {p}")
    if seed is None and any(layer.layout in ("modules", "linear") for layer in layers) and _is_compiled(model):
        raise ValueError(
            "expert dropout hooks into the experts of this model, and compiled code passes hooks by: train it without "
            "torch.compile, or without expert dropout"
        )
    with ExitStack() as stack:
        if seed is not None:
            # A few passes, for which nothing is compiled anew.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(intercepted_layers(model, layers, dropout=_Dropout(p, seed)))
        yield


def _is_compiled(model: nn.Module) -> bool:
    return any(
        isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl is not None
        for module in model.modules()
    )
