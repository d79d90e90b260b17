"""Experts in forms of their own: the forward of a class of modules, written once more around its second linear layers.

For a module of transformers that does not go through its experts interface, or for a user's own, somebody registers the
module's forward with the product of the second linear layers replaced by a call:

    @register_experts(MyExperts, down_proj="w2", transposed=True)
    def forward(self, second_linear, x, index, weights):
        ...
        outputs = second_linear(hidden, experts, tokens, len(x))
        ...

While slots are tapped or dropped that forward runs in the place of the module's own; at all other times the module is
left alone. The first time that a module is tapped its own forward runs as well, and the two have to agree.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bmoe_lightning.experts.grouped_matmul import ExpertGroups
from bmoe_lightning.experts.layouts.intercept import attached_state, expert_state, second_product
from bmoe_lightning.experts.types import Dropout, ExpertLayer, Tap
from bmoe_lightning.experts.wrappers import added_by_adapters, check_second_weight, present


@dataclass(frozen=True)
class ExpertAdapter:
    """What `register_experts` was told about a class of modules.

    Attributes:
        forward: `(module, second_linear, *arguments of the module's own forward)`.
        down_proj: name of the parameter that holds all second weights.
        transposed: whether that is `[E, d_in, d_out]` rather than `[E, d_out, d_in]`.
        num_experts: name of the attribute that holds E, where the weights of all experts are stacked in two dimensions.
        expert_parameters: names of all weights of experts; None where every parameter of the module is one.
        owner: the class, where it was given itself rather than its name.
    """

    forward: Callable[..., Any]
    down_proj: str
    transposed: bool = False
    num_experts: str | None = None
    expert_parameters: tuple[str, ...] | None = None
    owner: type[nn.Module] | None = None

    def stacked(self, module: nn.Module, weight: Tensor) -> Tensor:
        """The second weights as `[E, d_in, d_out]`."""
        if self.num_experts is not None:
            weight = weight.view(getattr(module, self.num_experts), -1, weight.shape[-1])
        return weight if self.transposed else weight.mT


_ADAPTERS: dict[str, ExpertAdapter] = {}
_REFUSALS: dict[str, str] = {}
# Modules whose own forward was seen to agree with the registered one.
_AGREED: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_TOLERANCES = {torch.bfloat16: 5e-2, torch.float16: 1e-2}


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
        experts_class: the class, or its qualified name (`"package.module.Class"`). Subclasses follow it, unless they
            have a forward of their own.
        down_proj: name of the parameter of the module that holds the second weights of all experts.
        transposed: whether it is `[E, d_in, d_out]` rather than `[E, d_out, d_in]`.
        num_experts: name of the module's attribute that holds E, where the parameter has two dimensions, the experts
            one below the other.
        expert_parameters: names of all weights of experts, where the module holds other parameters too.

    Raises:
        TypeError: if what is registered is no class of modules.
        ValueError: if another forward is registered for the class already.
    """
    if isinstance(experts_class, str):
        name, owner = experts_class, None
        if "." not in name:
            raise ValueError(f"{name!r} is no qualified name of a class (package.module.Class)")
    elif isinstance(experts_class, type) and issubclass(experts_class, nn.Module):
        name, owner = _qualified_name(experts_class), experts_class
    else:
        raise TypeError(f"register_experts takes a class of modules or its name, got {experts_class!r}")

    def register(forward: Callable[..., Any]) -> Callable[..., Any]:
        known = _ADAPTERS.get(name)
        # A cell of a notebook may run again.
        if known is not None and _qualified_name(known.forward) != _qualified_name(forward):
            raise ValueError(f"the experts of {name!r} are registered already, by {known.forward!r}")
        _ADAPTERS[name] = ExpertAdapter(forward, down_proj, transposed, num_experts, expert_parameters, owner)
        return forward

    return register


def adapter_of(module: nn.Module) -> ExpertAdapter | None:
    """The adapter of a module's class, or of a class whose forward it inherits."""
    found = _registered(module)
    return None if found is None or type(module).forward is not found[1].forward else found[0]


def _registered(module: nn.Module) -> tuple[ExpertAdapter, type[nn.Module]] | None:
    for kind in type(module).__mro__:
        adapter = _ADAPTERS.get(_qualified_name(kind))
        if adapter is not None and adapter.owner in (None, kind):
            return adapter, kind
    return None


def refuse_experts(experts_class: str, reason: str) -> None:
    """Have `find_expert_layers` refuse a class of modules, by its qualified name, with a reason."""
    _REFUSALS[experts_class] = reason


def refusal_of(module: nn.Module) -> str | None:
    """Why the experts of a module are refused, if they are."""
    found = _registered(module)
    if found is not None and type(module).forward is not found[1].forward:
        return (
            f"it has a forward of its own, and {found[1].__name__}'s was registered; register {type(module).__name__}"
        )
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
        try:
            weight = module.get_parameter(down_proj)
            for part in adapter.expert_parameters or ():
                module.get_parameter(part)
            check_second_weight(name, weight)
            shape = tuple(adapter.stacked(module, weight).shape)
        except (AttributeError, RuntimeError) as error:
            raise ValueError(
                f"the experts {name!r} ({type(module).__name__}) are not as they were registered ({error})"
            ) from error
        if len(shape) != 3:
            raise ValueError(
                f"the second weights of {name!r} have {len(shape)} dimensions; register the name of the attribute that "
                "holds the number of experts (num_experts=...) if they are stacked in two"
            )
        num_experts, d_in, d_out = shape
        return ExpertLayer(name, index, num_experts, d_in, d_out, "adapted", down_proj, adapter.transposed)

    def parameters(self, module: nn.Module, layer: ExpertLayer) -> dict[str, nn.Parameter]:
        """The one parameter of all second weights."""
        return {layer.down_proj: module.get_parameter(layer.down_proj)}

    def weights(self, model: nn.Module, layer: ExpertLayer) -> dict[str, Tensor]:
        """The same, with what PEFT's adapters of whole parameters add."""
        owner, _, name = f"{layer.name}.{layer.down_proj}".rpartition(".")
        weight = present(model.get_submodule(owner), name).detach()
        added = added_by_adapters(model, owner, name)
        return {layer.down_proj: weight if added is None else weight + added.to(weight)}

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
        with ExitStack() as stack:
            nested = expert_state(module) is not None
            stack.enter_context(attached_state(module, tap, dropout))
            if not nested:
                # What accelerate put around the forward stays around it.
                name = "_old_forward" if hasattr(module, "_hf_hook") else "forward"
                own = module.__dict__.get(name)
                if own is not None and getattr(own, "__func__", None) is not type(module).forward:
                    raise ValueError(
                        f"the experts {layer.name!r} have a forward of their own ({own!r}), which the registered one "
                        "would pass by; register a class for them"
                    )
                module.__dict__[name] = functools.partial(_run, module, adapter)
                stack.callback(_put_back, module, name, own)
            yield


def _put_back(module: nn.Module, name: str, own: Any) -> None:
    module.__dict__.pop(name)
    if own is not None:
        module.__dict__[name] = own


def _run(module: nn.Module, adapter: ExpertAdapter, *args: Any, **kwargs: Any) -> Any:
    output = adapter.forward(module, functools.partial(_second_linear, module, adapter), *args, **kwargs)
    state = expert_state(module)
    if module not in _AGREED and state is not None and state.dropout is None:
        with torch.no_grad():
            _compare(module, type(module).forward(module, *args, **kwargs), output)
        _AGREED.add(module)
    return output


def _compare(module: nn.Module, own: Any, registered: Any) -> None:
    """Refuse a registered forward that does not compute what the module's own does."""
    pairs = zip(*(x if isinstance(x, tuple) else (x,) for x in (own, registered)), strict=True)
    for expected, found in pairs:
        if not isinstance(expected, Tensor) or not expected.is_floating_point():
            continue
        tolerance = _TOLERANCES.get(expected.dtype, 1e-3)
        scale = torch.linalg.vector_norm(expected.double())
        alike = expected.shape == found.shape
        if not alike or torch.linalg.vector_norm(expected.double() - found.detach().double()) > tolerance * scale:
            raise RuntimeError(
                f"the forward registered for {type(module).__name__} does not compute what its own does: norms "
                f"{float(torch.linalg.vector_norm(found.detach().double())):.6g} and {float(scale):.6g}, shapes "
                f"{tuple(found.shape)} and {tuple(expected.shape)}. Is the second weight transposed?"
            )


def _second_linear(
    module: nn.Module,
    adapter: ExpertAdapter,
    hidden: Tensor,
    experts: Tensor,
    tokens: Tensor | None = None,
    num_tokens: int = 0,
) -> Tensor:
    owner, _, name = adapter.down_proj.rpartition(".")
    weight = adapter.stacked(module, present(module.get_submodule(owner), name)).to(hidden.device)
    slots = hidden.shape[:-1]
    if hidden.dim() != 2 or hidden.shape[1] != weight.shape[1] or experts.dtype != torch.int64:
        raise ValueError(
            f"second_linear of {type(module).__name__} takes activations [S, {weight.shape[1]}] and int64 experts [S], "
            f"got {tuple(hidden.shape)} and {experts.dtype} {tuple(experts.shape)}"
        )
    if experts.shape != slots or (tokens is not None and tokens.shape != slots):
        raise ValueError(
            f"second_linear of {type(module).__name__} got {len(hidden)} slots, experts {tuple(experts.shape)} and "
            f"tokens {None if tokens is None else tuple(tokens.shape)}"
        )
    groups = ExpertGroups(experts, len(weight))
    sorted_tokens = None if tokens is None else tokens[groups.order]
    return groups.restored(second_product(module, groups, hidden[groups.order], weight, sorted_tokens, num_tokens))


def _qualified_name(kind: Any) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
