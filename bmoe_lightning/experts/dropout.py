"""Dropout on the input of every expert's second linear layer, for training and for MC dropout.

Mixture-of-experts models of transformers hold no `nn.Dropout`: switching dropout modules on does nothing. This puts it
where the method needs it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from bmoe_lightning.experts.fused import attached_state, fused_implementation
from bmoe_lightning.experts.layout import ExpertLayer


class _Dropout:
    def __init__(self, p: float, seed: int | None) -> None:
        self.p = p
        self._seed = seed
        self._generator: torch.Generator | None = None

    def __call__(self, hidden: Tensor, training: bool) -> Tensor:
        if self._seed is None:
            return nn.functional.dropout(hidden, self.p, training)
        if self._generator is None:
            self._generator = torch.Generator(hidden.device).manual_seed(self._seed)
        keep = torch.empty_like(hidden).bernoulli_(1 - self.p, generator=self._generator)
        return hidden * keep / (1 - self.p)


@contextmanager
def expert_dropout(
    model: nn.Module, layers: Sequence[ExpertLayer], p: float, *, seed: int | None = None
) -> Iterator[None]:
    """Drop activations before the second linear layer of every expert.

    Args:
        model: the model.
        layers: its expert layers.
        p: probability that an activation is dropped, in [0, 1).
        seed: None drops in training mode only, from torch's own random stream, as `nn.Dropout` does. A seed drops in
            every mode, from a generator of its own: this is MC dropout.

    Raises:
        ValueError: if p is outside [0, 1).
    """
    if not 0 <= p < 1:
        raise ValueError(f"expert dropout must be in [0, 1), got {p}")
    dropout = _Dropout(p, seed)
    with ExitStack() as stack:
        if any(layer.layout == "fused" for layer in layers):
            stack.enter_context(fused_implementation(model))
        for layer in layers:
            experts = model.get_submodule(layer.name)
            if layer.layout == "fused":
                stack.enter_context(attached_state(experts, dropout=dropout))
                continue
            assert isinstance(experts, nn.ModuleList)
            for expert in experts:
                linear = expert.get_submodule(layer.down_proj)

                def drop_input(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                    return (dropout(inputs[0], module.training), *inputs[1:])

                # Ahead of other hooks, so that a tap sees what the layer sees.
                handle = linear.register_forward_pre_hook(drop_input, prepend=True)
                stack.callback(handle.remove)
        yield
