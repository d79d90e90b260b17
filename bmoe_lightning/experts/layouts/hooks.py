"""Interception of single linear layers through forward hooks."""

from __future__ import annotations

import functools
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from bmoe_lightning.experts.layouts.intercept import attached_state, expert_state
from bmoe_lightning.experts.types import Dropout, Tap
from bmoe_lightning.experts.wrappers.names import unwrapped
from bmoe_lightning.experts.wrappers.quantised import check_down_proj
from bmoe_lightning.experts.wrappers.transformers import has_parallel_plan


def check_linear_weight(name: str, linear: nn.Module) -> None:
    """Refuse a linear layer whose weight is not accessible.

    Raises:
        ValueError: If it is quantised, parametrised, uninitialised, or sharded by other means than FSDP2.
    """
    inner = unwrapped(linear)
    if has_parallel_plan(inner):
        raise ValueError(
            f"the linear layer {name!r} is sharded by tensor parallelism, which is not supported; load the model "
            "without a parallel plan"
        )
    weight = getattr(inner, "weight", None)
    check_down_proj(name, weight)
    if not isinstance(weight, nn.Parameter) or isinstance(weight, UninitializedParameter):
        raise ValueError(
            f"the weight of {name!r} is parametrised (computed from other parameters) or not initialised; remove the "
            "parametrisation, or run the model once"
        )


def intercept_linear(
    stack: ExitStack, linear: nn.Module, tap: Tap | None, dropout: Dropout | None, expert: int, *, knows_tokens: bool
) -> None:
    """Hook into a linear layer until a stack is closed.

    Args:
        stack: Stack that removes the hooks.
        linear: Linear layer, with its wrappers.
        tap: Tap of the layer's slots, or None.
        dropout: Dropout of the layer's input, or None.
        expert: Index of the expert that the layer belongs to.
        knows_tokens: Whether the layer's rows are the model's tokens, in their order.
    """
    nested = expert_state(linear) is not None
    stack.enter_context(attached_state(linear, tap, dropout))
    if not nested:
        # Innermost of all hooks, so that a tap sees the unmodified input and output of the layer.
        stack.callback(linear.register_forward_pre_hook(_drop, prepend=True, with_kwargs=True).remove)
        hook = functools.partial(_record, expert, knows_tokens)
        stack.callback(linear.register_forward_hook(hook, prepend=True, with_kwargs=True).remove)


# Torch registers a hook before its flag, so another thread may call these without keyword arguments.


def _drop(module: nn.Module, args: tuple[Any, ...], *rest: Any) -> tuple[Any, Any] | None:
    state = expert_state(module)
    if state is None or state.dropout is None:
        return None
    (kwargs,) = rest
    dropped = state.dropout(_input(args, kwargs), module.training)
    return ((dropped, *args[1:]), kwargs) if args else ((), {**kwargs, "input": dropped})


def _record(expert: int, knows_tokens: bool, module: nn.Module, args: tuple[Any, ...], *rest: Any) -> Tensor | None:
    state = expert_state(module)
    if state is None or state.tap is None:
        return None
    kwargs, output = rest
    x = _input(args, kwargs)
    flat = x.reshape(-1, x.shape[-1])
    experts = torch.full((len(flat),), expert, dtype=torch.int64, device=flat.device)
    # An expert is called on the tokens routed to it; a plain layer usually on all tokens, in order.
    tokens = torch.arange(len(flat), device=flat.device) if knows_tokens else None
    seen = state.tap.record(flat, experts, output.reshape(-1, output.shape[-1]), tokens, len(flat))
    # A copy, so that in-place operations of the model do not change the recorded output.
    return seen.view(output.shape).clone()


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    x: Tensor = args[0] if args else kwargs["input"]
    return x
