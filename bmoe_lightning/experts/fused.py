"""One forward for every fused experts module of transformers, in which each slot can be seen.

It is registered under the name `bmoe` with transformers' experts interface and computes what the model's own
implementations compute. Between the activation and the second linear layer it applies expert dropout; between that
layer and the routing weight it hands every slot to a tap.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from bmoe_lightning.experts.grouped import ExpertGroups
from bmoe_lightning.experts.layout import is_fused_experts

IMPLEMENTATION = "bmoe"
_STATE = "_bmoe_state"


class Tap(Protocol):
    """What sees the slots of an expert layer."""

    def record(
        self, inputs: Tensor, experts: Tensor, outputs: Tensor, tokens: Tensor | None, num_tokens: int
    ) -> Tensor:
        """Take slots: `inputs [S, d_in]`, `experts [S]`, `outputs [S, d_out]`, `tokens [S]`; return outputs to use."""
        ...


@dataclass
class ExpertState:
    """What is attached to an experts module while slots are tapped or dropped.

    Attributes:
        tap: sees every slot; None while nobody looks.
        dropout: see `bmoe_lightning.experts.dropout`; None while there is none.
    """

    tap: Tap | None = None
    dropout: Any = field(default=None)


def expert_state(module: nn.Module) -> ExpertState | None:
    """The state attached to an experts module, if any."""
    return module.__dict__.get(_STATE)


@contextmanager
def attached_state(module: nn.Module, **values: Any) -> Iterator[None]:
    """Set fields of a module's `ExpertState` for a while; what was there before comes back, also after an exception."""
    before = expert_state(module)
    fields = {"tap": before.tap, "dropout": before.dropout} if before else {}
    # Straight into __dict__: the state is no submodule, and nn.Module's bookkeeping has no part in it.
    module.__dict__[_STATE] = ExpertState(**{**fields, **values})
    try:
        yield
    finally:
        if before is None:
            module.__dict__.pop(_STATE, None)
        else:
            module.__dict__[_STATE] = before


@contextmanager
def fused_implementation(model: nn.Module) -> Iterator[None]:
    """Send the fused experts of a model through `tapped_experts_forward`; restore the implementation afterwards.

    Args:
        model: any module; the outermost `PreTrainedModel`s in it are switched. Without fused experts nothing happens.

    Raises:
        RuntimeError: if the name `bmoe` is taken in transformers' registry, or a model does not let itself be switched.
    """
    fused = [(name, module) for name, module in model.named_modules() if is_fused_experts(module)]
    if not fused:
        yield
        return
    taken = ALL_EXPERTS_FUNCTIONS.get(IMPLEMENTATION)
    if taken is None:
        ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, tapped_experts_forward)
    elif taken is not tapped_experts_forward:
        raise RuntimeError(
            f"transformers already has an experts implementation called {IMPLEMENTATION!r} ({taken!r}); "
            "bmoe_lightning needs that name"
        )
    owners = outermost_pretrained(model)
    before = [owner.get_experts_implementation() for owner in owners]
    try:
        for owner in owners:
            owner.set_experts_implementation(IMPLEMENTATION)
        for name, module in fused:
            actual = module.config._experts_implementation
            if actual != IMPLEMENTATION:
                raise RuntimeError(
                    f"the experts {name!r} stay with the implementation {actual!r}: their model class does not let its "
                    "experts implementation be set. Define the model in an importable file, or use an nn.ModuleList of "
                    "experts."
                )
        yield
    finally:
        for owner, implementation in zip(owners, before, strict=True):
            owner.set_experts_implementation(implementation)


def outermost_pretrained(model: nn.Module) -> list[PreTrainedModel]:
    """The `PreTrainedModel`s in a module that lie in no other one."""
    if isinstance(model, PreTrainedModel):
        return [model]
    return [owner for child in model.children() for owner in outermost_pretrained(child)]


def tapped_experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Run all experts on the tokens routed to them.

    Args:
        self: a module that transformers decorated with `use_experts_implementation`.
        hidden_states: `[T, hidden]`.
        top_k_index: `[T, k]` expert of each slot.
        top_k_weights: `[T, k]` routing weights.

    Returns:
        `[T, hidden]`.

    Raises:
        RuntimeError: under expert parallelism, where most experts live elsewhere.
    """
    # Absent before transformers 5.19 and 5.21, as are the features they name.
    if getattr(self, "_is_expert_parallel", False):
        raise RuntimeError("expert parallelism is not supported: load the model without an expert-parallel plan")
    num_tokens, top_k = top_k_index.shape
    groups = ExpertGroups(top_k_index.reshape(-1), self.num_experts)
    tokens = groups.order // top_k
    state = expert_state(self)

    if self.has_gate:
        hidden = self._apply_gate(_linear(self, groups, hidden_states[tokens], "gate_up_proj"))
    else:
        hidden = self.act_fn(_linear(self, groups, hidden_states[tokens], "up_proj"))
    if state is not None and state.dropout is not None:
        hidden = state.dropout(hidden, self.training)
    output = _multiply(groups, hidden, self.down_proj, self.is_transposed)
    if state is not None and state.tap is not None:
        output = state.tap.record(hidden, groups.experts, output, tokens, num_tokens)
    if self.has_bias:
        output = output + self.down_proj_bias[groups.experts]
    if getattr(self, "has_post_expert_norm", False):
        output = self.post_expert_norm(output)

    weighted = output * top_k_weights.reshape(-1)[groups.order].unsqueeze(-1)
    restored = torch.empty_like(groups.order)
    restored[groups.order] = torch.arange(len(restored), device=restored.device)
    return weighted[restored].view(num_tokens, top_k, output.shape[-1]).sum(dim=1).to(hidden_states.dtype)


def _linear(module: Any, groups: ExpertGroups, x: Tensor, name: str) -> Tensor:
    output = _multiply(groups, x, getattr(module, name), module.is_transposed)
    return output + getattr(module, f"{name}_bias")[groups.experts] if module.has_bias else output


def _multiply(groups: ExpertGroups, x: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    # Grouped products ignore autocast; like transformers, the weights' dtype decides.
    return groups.matmul(x.to(weight.dtype), weight if transposed else weight.mT)
