"""Experts in forms of their own: the forward of a class of modules, written once more around its second linear layers.

For a module of transformers that does not go through its experts interface, or for a user's own, somebody registers the
module's forward with the product of the second linear layers replaced by a call:

    @register_experts(MyExperts, down_proj="w2", transposed=True)
    def forward(self, second_linear, x, index, weights):
        ...
        outputs = second_linear(hidden, experts, tokens, len(x))
        ...

While slots are tapped or dropped that forward runs in the place of the module's own; at all other times the module is
left alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from bmoe_lightning.experts.grouped import ExpertGroups
from bmoe_lightning.experts.layer import Dropout, ExpertLayer, Tap
from bmoe_lightning.experts.seam import attached_state, expert_state, second_product
from bmoe_lightning.experts.wrapping import check_second_weight, present


@dataclass(frozen=True)
class ExpertAdapter:
    """What `register_experts` was told about a class of modules.

    Attributes:
        forward: `(module, second_linear, *arguments of the module's own forward)`.
        down_proj: name of the parameter that holds all second weights.
        transposed: whether that is `[E, d_in, d_out]` rather than `[E, d_out, d_in]`.
        num_experts: name of the attribute that holds E, where the weights of all experts are stacked in two dimensions.
        expert_parameters: names of all weights of experts; None where every parameter of the module is one.
    """

    forward: Callable[..., Any]
    down_proj: str
    transposed: bool = False
    num_experts: str | None = None
    expert_parameters: tuple[str, ...] | None = None

    def stacked(self, module: nn.Module, weight: Tensor) -> Tensor:
        """The second weights as `[E, d_in, d_out]`."""
        if self.num_experts is not None:
            weight = weight.view(getattr(module, self.num_experts), -1, weight.shape[-1])
        return weight if self.transposed else weight.mT


_ADAPTERS: dict[str, ExpertAdapter] = {}
_REFUSALS: dict[str, str] = {}


def register_experts(
    experts_class: type[nn.Module] | str,
    *,
    down_proj: str,
    transposed: bool = False,
    num_experts: str | None = None,
    expert_parameters: tuple[str, ...] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Teach the library a class of modules that holds all experts of a layer; use it as a decorator.

    What is decorated computes what the module's forward computes. Its arguments are the module, a function
    `second_linear(hidden [S, d_in], experts [S], tokens [S] or None, num_tokens) -> [S, d_out]` and those of the
    module's forward. It calls `second_linear` once, on all slots, in any order, in the place of the product with the
    second weights: before bias and routing weight. `tokens` are positions among the `num_tokens` tokens of the call,
    flattened from `[batch, length]`; with None, each slot's example is found from gradients, at the price of two
    backward passes. Slots of zeros, which pad the buffers of some models, count nowhere.

    Args:
        experts_class: the class, whose subclasses follow it, or its qualified name (`"package.module.Class"`).
        down_proj: name of the parameter of the module that holds the second weights of all experts.
        transposed: whether it is `[E, d_in, d_out]` rather than `[E, d_out, d_in]`.
        num_experts: name of the module's attribute that holds E, where the parameter has two dimensions, the experts
            one below the other.
        expert_parameters: names of all weights of experts, where the module holds other parameters too.

    Raises:
        ValueError: if the class is registered already.
    """
    name = experts_class if isinstance(experts_class, str) else _qualified_name(experts_class)

    def register(forward: Callable[..., Any]) -> Callable[..., Any]:
        if name in _ADAPTERS:
            raise ValueError(f"the experts of {name!r} are registered already, by {_ADAPTERS[name].forward!r}")
        _ADAPTERS[name] = ExpertAdapter(forward, down_proj, transposed, num_experts, expert_parameters)
        return forward

    return register


def adapter_of(module: nn.Module) -> ExpertAdapter | None:
    """The adapter of a module's class, or of the nearest class it is derived from."""
    names = (_qualified_name(kind) for kind in type(module).__mro__)
    return next((_ADAPTERS[name] for name in names if name in _ADAPTERS), None)


def refuse_experts(experts_class: str, reason: str) -> None:
    """Have `find_expert_layers` refuse a class of modules, by its qualified name, with a reason."""
    _REFUSALS[experts_class] = reason


def refusal_of(module: nn.Module) -> str | None:
    """Why a module's class is refused, if it is."""
    return _REFUSALS.get(_qualified_name(type(module)))


class AdaptedExperts:
    """The layout of registered classes; see `Layout`."""

    def layer(self, name: str, index: int, module: nn.Module, down_proj: str) -> ExpertLayer:
        """Describe a module of a registered class."""
        adapter = adapter_of(module)
        if adapter is None or adapter.down_proj != down_proj:
            raise ValueError(
                f"{name!r} is a {type(module).__name__}, whose experts with the second weights {down_proj!r} nobody "
                "registered (see register_experts)"
            )
        weight = module.get_parameter(down_proj)
        check_second_weight(name, weight)
        num_experts, d_in, d_out = adapter.stacked(module, weight).shape
        return ExpertLayer(name, index, num_experts, d_in, d_out, "adapted", down_proj, adapter.transposed)

    def parameters(self, module: nn.Module, layer: ExpertLayer) -> dict[str, nn.Parameter]:
        """The one parameter of all second weights."""
        return {layer.down_proj: module.get_parameter(layer.down_proj)}

    def weights(self, model: nn.Module, layer: ExpertLayer) -> dict[str, Tensor]:
        """The same."""
        owner, _, name = f"{layer.name}.{layer.down_proj}".rpartition(".")
        return {layer.down_proj: present(model.get_submodule(owner), name).detach()}

    def expert_parameters(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters that the adapter names, or all."""
        adapter = adapter_of(module)
        assert adapter is not None
        if adapter.expert_parameters is None:
            return dict(module.named_parameters())
        return {name: module.get_parameter(name) for name in adapter.expert_parameters}

    @contextmanager
    def intercepted(
        self, module: nn.Module, layer: ExpertLayer, tap: Tap | None, dropout: Dropout | None
    ) -> Iterator[None]:
        """Put the adapter's forward in the place of the module's own."""
        adapter = adapter_of(module)
        assert adapter is not None
        replaced = expert_state(module) is not None
        own = module.__dict__.get("forward")
        with attached_state(module, tap, dropout):
            if not replaced:
                module.__dict__["forward"] = functools.partial(
                    adapter.forward, module, functools.partial(_second_linear, module, adapter)
                )
            try:
                yield
            finally:
                if not replaced:
                    module.__dict__.pop("forward")
                    if own is not None:
                        module.__dict__["forward"] = own


def _second_linear(
    module: nn.Module,
    adapter: ExpertAdapter,
    hidden: Tensor,
    experts: Tensor,
    tokens: Tensor | None = None,
    num_tokens: int = 0,
) -> Tensor:
    weight = adapter.stacked(module, module.get_parameter(adapter.down_proj))
    groups = ExpertGroups(experts, len(weight))
    sorted_tokens = None if tokens is None else tokens[groups.order]
    output = second_product(module, groups, hidden[groups.order], weight, sorted_tokens, num_tokens)
    return groups.restored(output)


def _qualified_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
