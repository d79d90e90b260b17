"""The `down_proj` product in the forward of an experts module, with dropout before it and taps after it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from bmoe_lightning.experts.grouped_matmul import ExpertGroups
from bmoe_lightning.experts.threads import applies, scope
from bmoe_lightning.experts.types import Dropout, Tap

_STATE = "_bmoe_state"


@dataclass(frozen=True)
class ExpertState:
    """The state attached to an experts module while slots are tapped or activations dropped.

    Attributes:
        tap: Tap of all slots, or None.
        dropout: Dropout of the inputs of `down_proj` (see `bmoe_lightning.experts.dropout`), or None.
        thread: The thread in which it applies (see `bmoe_lightning.experts.threads.scope`).
        outer: The state of the module before, which applies in other threads.
        first: Taps of the first projections, by the name of their parameter.
    """

    tap: Tap | None = None
    dropout: Dropout | None = None
    thread: int | None = None
    outer: ExpertState | None = None
    first: Mapping[str, Tap] = field(default_factory=dict)

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of the module, made meanwhile by another thread, has no state.
        return _no_state, ()


def _no_state() -> None:
    return None


def expert_state(module: nn.Module) -> ExpertState | None:
    """The state attached to an experts module that applies in this thread, if any."""
    state: ExpertState | None = module.__dict__.get(_STATE)
    while state is not None and not applies(state.thread):
        state = state.outer
    return state


@contextmanager
def attached_state(
    module: nn.Module, tap: Tap | None = None, dropout: Dropout | None = None, *, first: str | None = None
) -> Iterator[None]:
    """Attach a tap or dropout to a module, in addition to its state so far, which is restored afterwards.

    They apply in this thread alone, unless within `bmoe_lightning.experts.threads.in_all_threads`.

    Args:
        module: The module.
        tap: Tap of the slots, or None.
        dropout: Dropout of the inputs of `down_proj`, or None.
        first: Name of the parameter of the first projection that the tap is for; None for that of `down_proj`.
    """
    before: ExpertState | None = module.__dict__.get(_STATE)
    seen = expert_state(module) or ExpertState()
    # Directly in __dict__, so that nn.Module does not register the state.
    taps = {**seen.first, first: tap} if first is not None and tap is not None else seen.first
    own = tap if first is None else None
    module.__dict__[_STATE] = ExpertState(own or seen.tap, dropout or seen.dropout, scope(), before, taps)
    try:
        yield
    finally:
        if before is None:
            module.__dict__.pop(_STATE, None)
        else:
            module.__dict__[_STATE] = before


def down_proj_product(
    module: nn.Module, groups: ExpertGroups, hidden: Tensor, weight: Tensor, tokens: Tensor | None, num_tokens: int
) -> Tensor:
    """Multiply slots with the `down_proj` of their experts, through the module's dropout and tap.

    Args:
        module: The experts module.
        groups: The slots, sorted by expert.
        hidden: Inputs `[S, d_in]`, sorted by expert.
        weight: Weights `[E, d_in, d_out]`.
        tokens: Flattened token of each slot, `[S]` int64, or None.
        num_tokens: Number of tokens.

    Returns:
        `[S, d_out]`.
    """
    state = expert_state(module)
    if state is not None and state.dropout is not None:
        hidden = state.dropout(hidden, module.training)
    output = groups.matmul(hidden.to(weight.dtype), weight)
    if state is not None and state.tap is not None:
        output = state.tap.record(hidden, groups.experts, output, tokens, num_tokens)
    return output


def combine(groups: ExpertGroups, output: Tensor, top_k_weights: Tensor) -> Tensor:
    """Weight the outputs of sorted slots and sum those of each token, in an order that is the same on every device.

    Args:
        groups: Groups over the flattened slots of `T` tokens with `k` experts each.
        output: Outputs `[T k, d_out]`, sorted by expert.
        top_k_weights: Routing weights `[T, k]`.

    Returns:
        `[T, d_out]`.
    """
    weighted = output * top_k_weights.reshape(-1)[groups.order].unsqueeze(-1)
    return groups.restored(weighted).view(*top_k_weights.shape, output.shape[-1]).sum(dim=1)
