"""Experts that are modules of their own, and plain linear layers as the only expert of a layer."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from bmoe_lightning.experts.layouts.intercept import attached_state, expert_state
from bmoe_lightning.experts.types import Dropout, ExpertLayer, Tap
from bmoe_lightning.experts.wrappers import (
    check_second_weight,
    effective_weight,
    is_linear,
    is_wrapped_name,
    linear_shape,
    linear_weight_name,
    linears_of,
    plain_name,
    unwrapped,
)


class ModuleExperts:
    """The layout of an `nn.ModuleList` (or `nn.ModuleDict`) with one module an expert; see `Layout`."""

    def layer(self, name: str, index: int, module: nn.Module, down_proj: str) -> ExpertLayer:
        """Describe a list of experts with the given second linear layer."""
        experts = experts_of(module)
        if not experts:
            raise ValueError(f"{name!r} is no list of experts but a {type(module).__name__}")
        shapes = set()
        for key, expert in experts.items():
            linear = _second_linear(expert, down_proj)
            if linear is None:
                raise ValueError(
                    f"experts of {name!r} have no linear layer {down_proj!r}; they have {sorted(linears_of(expert))}"
                )
            _check(f"{name}.{key}.{down_proj}", linear)
            shapes.add(linear_shape(linear))
        if len(shapes) > 1:
            raise ValueError(f"the second linear layers of {name!r} differ in shape: {sorted(shapes)}")
        d_out, d_in = shapes.pop()
        return ExpertLayer(name, index, len(experts), d_in, d_out, "modules", down_proj)

    def parameters(self, module: nn.Module, layer: ExpertLayer) -> dict[str, nn.Parameter]:
        """The weight of each expert's second linear layer; under an adapter of PEFT, that of the layer below."""
        names = [f"{name}.{linear_weight_name(linear)}" for name, linear in self._linears(module, layer).items()]
        return {name: module.get_parameter(name) for name in names}

    def weights(self, model: nn.Module, layer: ExpertLayer) -> dict[str, Tensor]:
        """What each of them multiplies with, adapters included."""
        linears = self._linears(model.get_submodule(layer.name), layer)
        return {f"{name}.{linear_weight_name(x)}": effective_weight(x) for name, x in linears.items()}

    def expert_parameters(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """All parameters of the list."""
        return dict(module.named_parameters())

    @contextmanager
    def intercepted(
        self, module: nn.Module, layer: ExpertLayer, tap: Tap | None, dropout: Dropout | None
    ) -> Iterator[None]:
        """Hook into every second linear layer."""
        with ExitStack() as stack:
            for expert, linear in enumerate(self._linears(module, layer).values()):
                _hook(stack, linear, tap, dropout, expert, knows_tokens=False)
            yield

    def _linears(self, module: nn.Module, layer: ExpertLayer) -> dict[str, nn.Module]:
        found = {}
        for name, expert in experts_of(module).items():
            linear = _second_linear(expert, layer.down_proj)
            if linear is None:
                raise AttributeError(f"{name!r} has no linear layer {layer.down_proj!r}")
            found[f"{name}.{layer.down_proj}"] = linear
        return found


class LinearLayer:
    """The layout of a plain `nn.Linear`, the only expert of its layer; see `Layout`."""

    def layer(self, name: str, index: int, module: nn.Module, down_proj: str) -> ExpertLayer:
        """Describe a linear layer."""
        if not is_linear(module) or down_proj:
            raise ValueError(f"{name!r} is no linear layer but a {type(module).__name__}")
        _check(name, module)
        d_out, d_in = linear_shape(module)
        return ExpertLayer(name, index, 1, d_in, d_out, "linear", "")

    def parameters(self, module: nn.Module, layer: ExpertLayer) -> dict[str, nn.Parameter]:
        """Its weight."""
        name = linear_weight_name(module)
        return {name: module.get_parameter(name)}

    def weights(self, model: nn.Module, layer: ExpertLayer) -> dict[str, Tensor]:
        """What it multiplies with, adapters included."""
        module = model.get_submodule(layer.name)
        return {linear_weight_name(module): effective_weight(module)}

    def expert_parameters(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """Its weight and bias."""
        return dict(module.named_parameters())

    @contextmanager
    def intercepted(
        self, module: nn.Module, layer: ExpertLayer, tap: Tap | None, dropout: Dropout | None
    ) -> Iterator[None]:
        """Hook into the layer."""
        with ExitStack() as stack:
            _hook(stack, module, tap, dropout, 0, knows_tokens=True)
            yield


def experts_of(module: nn.Module) -> dict[str, nn.Module]:
    """The experts in a list or dictionary of modules, by name: what has linear layers; a dropout may stand beside."""
    if not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return {}
    return {name: child for name, child in module.named_children() if linears_of(child)}


def _second_linear(expert: nn.Module, down_proj: str) -> nn.Module | None:
    """The second linear layer of an expert, with or without wrappers between."""
    try:
        found = expert.get_submodule(down_proj)
    except AttributeError:
        found = None
    if found is not None and is_linear(found) and not is_wrapped_name(down_proj):
        return found
    linears = {plain_name(name): linear for name, linear in linears_of(expert).items()}
    return linears.get(plain_name(down_proj))


def _check(name: str, linear: nn.Module) -> None:
    inner = unwrapped(linear)
    if getattr(inner, "_is_hooked", False):
        raise ValueError(
            f"the linear layer {name!r} is spread over processes (tensor parallelism), so that each knows a part of "
            "it; load the model without a parallel plan"
        )
    weight = getattr(inner, "weight", None)
    check_second_weight(name, weight)
    if not isinstance(weight, nn.Parameter) or isinstance(weight, UninitializedParameter):
        raise ValueError(f"the weight of {name!r} is computed from others (parametrised), or not there yet")


def _hook(
    stack: ExitStack, linear: nn.Module, tap: Tap | None, dropout: Dropout | None, expert: int, *, knows_tokens: bool
) -> None:
    nested = expert_state(linear) is not None
    stack.enter_context(attached_state(linear, tap, dropout))
    if not nested:
        # Next to the layer itself, so that a tap sees what it got and what it made.
        stack.callback(linear.register_forward_pre_hook(_drop, prepend=True, with_kwargs=True).remove)
        hook = functools.partial(_record, expert, knows_tokens)
        stack.callback(linear.register_forward_hook(hook, prepend=True, with_kwargs=True).remove)


def _drop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    state = expert_state(module)
    if state is None or state.dropout is None:
        return None
    dropped = state.dropout(_input(args, kwargs), module.training)
    return ((dropped, *args[1:]), kwargs) if args else ((), {**kwargs, "input": dropped})


def _record(
    expert: int, knows_tokens: bool, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> Tensor | None:
    state = expert_state(module)
    if state is None or state.tap is None:
        return None
    x = _input(args, kwargs)
    flat = x.reshape(-1, x.shape[-1])
    experts = torch.full((len(flat),), expert, dtype=torch.int64, device=flat.device)
    # An expert is called on whatever tokens were routed to it; a plain layer usually on all of them, in order.
    tokens = torch.arange(len(flat), device=flat.device) if knows_tokens else None
    seen = state.tap.record(flat, experts, output.reshape(-1, output.shape[-1]), tokens, len(flat))
    # A copy: what the model does to it in place is no part of the layer.
    return seen.view(output.shape).clone()


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    x: Tensor = args[0] if args else kwargs["input"]
    return x
