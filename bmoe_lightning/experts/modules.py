"""Experts that are modules of their own, and plain linear layers as the only expert of a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bmoe_lightning.experts.layer import Dropout, ExpertLayer, Tap
from bmoe_lightning.experts.wrapping import (
    check_second_weight,
    effective_weight,
    is_linear,
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
    linears = {plain_name(name): linear for name, linear in linears_of(expert).items()}
    return linears.get(plain_name(down_proj))


def _check(name: str, linear: nn.Module) -> None:
    inner = unwrapped(linear)
    if getattr(inner, "_is_hooked", False):
        raise ValueError(
            f"the linear layer {name!r} is spread over processes (tensor parallelism), so that each knows a part of "
            "it; load the model without a parallel plan"
        )
    check_second_weight(name, getattr(inner, "weight", None))


def _hook(
    stack: ExitStack, linear: nn.Module, tap: Tap | None, dropout: Dropout | None, expert: int, *, knows_tokens: bool
) -> None:
    if dropout is not None:
        # Ahead of other hooks, so that a tap sees what the layer sees.
        stack.callback(linear.register_forward_pre_hook(_dropping(dropout), prepend=True).remove)
    if tap is not None:
        stack.callback(linear.register_forward_hook(_recording(tap, expert, knows_tokens=knows_tokens)).remove)


def _dropping(dropout: Dropout) -> Callable[..., tuple[Any, ...]]:
    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (dropout(inputs[0], module.training), *inputs[1:])

    return hook


def _recording(tap: Tap, expert: int, *, knows_tokens: bool) -> Callable[..., Tensor]:
    def hook(_module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        flat = inputs[0].reshape(-1, inputs[0].shape[-1])
        experts = torch.full((len(flat),), expert, dtype=torch.int64, device=flat.device)
        # An expert is called on whatever tokens were routed to it; a plain layer usually on all of them, in order.
        tokens = torch.arange(len(flat), device=flat.device) if knows_tokens else None
        return tap.record(flat, experts, output.reshape(-1, output.shape[-1]), tokens, len(flat)).view(output.shape)

    return hook
