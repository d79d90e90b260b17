"""Dropout on the input of every expert's `down_proj`, for training and for MC dropout (https://arxiv.org/abs/1506.02142).

Mixture-of-experts models of transformers have no `nn.Dropout` in their experts, so training mode alone drops nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from bmoe_lightning.experts.interception import intercepted_layers
from bmoe_lightning.experts.layouts.registry import LAYOUTS
from bmoe_lightning.experts.types import ExpertLayer
from bmoe_lightning.experts.wrappers.compiled import eager_code, is_compiled


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
            # Another seed for each device, or layers on two devices would share their masks.
            seed = self._seed + 5_915_587 * len(self._generators)
            generator = self._generators[hidden.device] = torch.Generator(hidden.device).manual_seed(seed)
        keep = torch.empty_like(hidden).bernoulli_(1 - self.p, generator=generator)
        return hidden * keep / (1 - self.p)


@contextmanager
def expert_dropout(
    model: nn.Module, layers: Sequence[ExpertLayer], p: float, *, seed: int | None = None
) -> Iterator[None]:
    """Drop activations before the `down_proj` of every expert; of nested contexts the innermost applies.

    A compiled function that calls the model is not detected, and the model may run without dropout in it.

    Args:
        model: The model.
        layers: Its expert layers.
        p: Probability that an activation is dropped, in [0, 1).
        seed: Seed of a separate generator, with which activations are dropped in training and evaluation mode: MC
            dropout, for predictions (activations that are recomputed for gradients would get other masks). It applies
            in this thread alone, which holds the model's lock meanwhile. None drops in training mode only, in all
            threads, with torch's global generator, as `nn.Dropout` does.

    Raises:
        ValueError: If `p` is outside [0, 1), or compiled code would skip the dropout in training.
    """
    if not 0 <= p < 1:
        raise ValueError(f"expert dropout is {p}; give a probability in [0, 1)")
    if seed is None and any(LAYOUTS[layer.layout].uses_hooks for layer in layers) and is_compiled(model):
        raise ValueError(
            "expert dropout uses forward hooks in the experts of this model, and compiled code skips hooks: train it "
            "without torch.compile, or without expert dropout"
        )
    with ExitStack() as stack:
        if seed is not None:
            # Only a few passes, for which a recompilation does not pay off.
            stack.enter_context(eager_code())
        # Backward passes that recompute activations of a training step may run in another thread.
        stack.enter_context(intercepted_layers(model, layers, dropout=_Dropout(p, seed), everywhere=seed is None))
        yield
