"""Experts that are modules of their own, and plain linear layers as the only expert of a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bmoe_lightning.experts.layer import Dropout, ExpertLayer, Tap, check_second_weight


class ModuleExperts:
    """The layout of an `nn.ModuleList` (or `nn.ModuleDict`) with one module an expert; see `Layout`."""

    def layer(self, name: str, index: int, module: nn.Module, down_proj: str) -> ExpertLayer:
        """Describe a list of experts with the given second linear layer."""
        experts = experts_of(module)
        if not experts:
            raise ValueError(f"{name!r} is no list of experts but a {type(module).__name__}")
        shapes = []
        for key, expert in experts.items():
            linear = linears_of(expert).get(down_proj)
            if linear is None:
                raise ValueError(
                    f"experts of {name!r} have no linear layer {down_proj!r}; they have {sorted(linears_of(expert))}"
                )
            check_second_weight(f"{name}.{key}.{down_proj}", base_linear(linear).weight)
            shapes.append(tuple(base_linear(linear).weight.shape))
        if len(set(shapes)) > 1:
            raise ValueError(f"the second linear layers of {name!r} differ in shape: {sorted(set(shapes))}")
        return ExpertLayer(name, index, len(experts), shapes[0][1], shapes[0][0], "modules", down_proj)

    def parameters(self, module: nn.Module, layer: ExpertLayer) -> dict[str, nn.Parameter]:
        """The weight of each expert's second linear layer; under an adapter of PEFT, that of the layer below."""
        names = [_weight_name(name, linear) for name, linear in self._linears(module, layer).items()]
        return {name: module.get_parameter(name) for name in names}

    def weights(self, module: nn.Module, layer: ExpertLayer) -> dict[str, Tensor]:
        """What each of them multiplies with, active adapters of PEFT included."""
        linears = self._linears(module, layer)
        return {_weight_name(name, linear): effective_weight(linear) for name, linear in linears.items()}

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
        return {
            f"{name}.{layer.down_proj}": expert.get_submodule(layer.down_proj)
            for name, expert in experts_of(module).items()
        }


class LinearLayer:
    """The layout of a plain `nn.Linear`, the only expert of its layer; see `Layout`."""

    def layer(self, name: str, index: int, module: nn.Module, down_proj: str) -> ExpertLayer:
        """Describe a linear layer."""
        if not is_linear(module) or down_proj:
            raise ValueError(f"{name!r} is no linear layer but a {type(module).__name__}")
        weight = base_linear(module).weight
        check_second_weight(name, weight)
        return ExpertLayer(name, index, 1, weight.shape[1], weight.shape[0], "linear", "")

    def parameters(self, module: nn.Module, layer: ExpertLayer) -> dict[str, nn.Parameter]:
        """Its weight."""
        name = _weight_name("", module)
        return {name: module.get_parameter(name)}

    def weights(self, module: nn.Module, layer: ExpertLayer) -> dict[str, Tensor]:
        """What it multiplies with, active adapters of PEFT included."""
        return {_weight_name("", module): effective_weight(module)}

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


def is_linear(module: nn.Module) -> bool:
    """Whether a module is an `nn.Linear`, or one that PEFT wrapped."""
    return isinstance(module, nn.Linear) or isinstance(getattr(module, "base_layer", None), nn.Linear)


def base_linear(module: nn.Module) -> nn.Linear:
    """The `nn.Linear` itself, below what PEFT put around it."""
    linear = module if isinstance(module, nn.Linear) else module.base_layer
    assert isinstance(linear, nn.Linear)
    return linear


def linears_of(module: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of a module by name, in order; one that PEFT wrapped is one layer, under the wrapper's name."""
    found: dict[str, nn.Module] = {}
    for name, child in module.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if name and is_linear(child) and not inside:
            found[name] = child
    return found


def effective_weight(linear: nn.Module) -> Tensor:
    """What a linear layer multiplies with, `[d_out, d_in]`, detached: its weight and PEFT's active adapters."""
    weight = base_linear(linear).weight.detach()
    # PEFT's names, read without importing it.
    adapters: Any = linear
    if isinstance(linear, nn.Linear) or adapters.merged or adapters.disable_adapters:
        return weight
    for name in adapters.active_adapters:
        if name in adapters.lora_A:
            weight = weight + adapters.get_delta_weight(name).detach().to(weight.dtype)
    return weight


def _weight_name(name: str, linear: nn.Module) -> str:
    return ".".join(part for part in (name, "" if isinstance(linear, nn.Linear) else "base_layer", "weight") if part)


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
