"""Experts of custom classes: a registered forward in which the `down_proj` product is a function call.

For a class of transformers that does not use its experts interface, or for a user's class:

    @register_experts(MyExperts, down_proj="w2", transposed=True)
    def forward(self, down_proj, x, index, weights):
        ...
        outputs = down_proj(hidden, experts, tokens, len(x))
        ...

While slots are tapped or activations dropped, that forward replaces the module's; at all other times the module is
unchanged. The first time that a module is tapped, its original forward runs as well, and both must agree.
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
from bmoe_lightning.experts.layouts.intercept import attached_state, down_proj_product, expert_state
from bmoe_lightning.experts.types import Dropout, ExpertLayer, Layout, Tap
from bmoe_lightning.experts.wrappers.accelerate import forward_attribute, materialized
from bmoe_lightning.experts.wrappers.linear import effective_parameter
from bmoe_lightning.experts.wrappers.quantised import check_down_proj


@dataclass(frozen=True)
class ExpertAdapter:
    """The registration of a class of modules with `register_experts`.

    Attributes:
        forward: Function `(module, down_proj, *arguments of the module's forward)`.
        down_proj: Name of the parameter that holds the `down_proj` of all experts.
        transposed: Whether that is `[E, d_in, d_out]` rather than `[E, d_out, d_in]`.
        num_experts: Name of the attribute that holds E, where the weights of all experts are stacked in two dimensions.
        expert_parameters: Names of all weights of experts; None where every parameter of the module is one.
        owner: The class, if the class itself was registered rather than its name.
    """

    forward: Callable[..., Any]
    down_proj: str
    transposed: bool = False
    num_experts: str | None = None
    expert_parameters: tuple[str, ...] | None = None
    owner: type[nn.Module] | None = None

    def stacked(self, module: nn.Module, weight: Tensor) -> Tensor:
        """The `down_proj` weights as `[E, d_in, d_out]`."""
        if self.num_experts is not None:
            weight = weight.view(getattr(module, self.num_experts), -1, weight.shape[-1])
        return weight if self.transposed else weight.mT


_ADAPTERS: dict[str, ExpertAdapter] = {}
_REFUSALS: dict[str, str] = {}
# Modules whose forward was compared with the registered one.
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
    """Register the forward of a class of modules that hold all experts of a layer; use it as a decorator.

    The decorated function computes what the module's forward computes. Its arguments are the module, a function
    `down_proj(hidden [S, d_in], experts [S], tokens [S] or None, num_tokens) -> [S, d_out]` and those of the module's
    forward. It calls `down_proj` once, on all slots, in any order, instead of the product with the `down_proj` weights:
    before bias and routing weight. `tokens` are positions among the `num_tokens` tokens of the call, flattened from
    `[batch, length]`; with None, each slot's example is found from gradients, at the cost of two backward passes.
    Slots of zeros, which pad the buffers of some models, have no effect.

    Args:
        experts_class: The class, or its qualified name (`"package.module.Class"`). Subclasses are included, unless they
            override the forward.
        down_proj: Name of the module's parameter that holds the `down_proj` weights of all experts.
        transposed: Whether it is `[E, d_in, d_out]` rather than `[E, d_out, d_in]`.
        num_experts: Name of the module's attribute that holds E, where the parameter has two dimensions, with the
            experts stacked along the first.
        expert_parameters: Names of all weights of experts, where the module holds other parameters too.

    Raises:
        TypeError: If it is not a subclass of `nn.Module`.
        ValueError: If another forward is registered for the class already.
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
        # A notebook cell may run again.
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
    """Register a class of modules, by its qualified name, as not supported, with the reason for the error message."""
    _REFUSALS[experts_class] = reason


def refusal_of(module: nn.Module) -> str | None:
    """The reason why the experts of a module are not supported; None if they are."""
    found = _registered(module)
    if found is not None and type(module).forward is not found[1].forward:
        return f"it overrides the registered forward of {found[1].__name__}; register {type(module).__name__} too"
    return _REFUSALS.get(_qualified_name(type(module)))


class RegisteredExperts(Layout):
    """Classes of modules whose forward was registered with `register_experts`."""

    name = "adapted"
    description = "classes that were registered with register_experts"
    may_hold_block = True

    def detect(
        self, name: str, module: nn.Module, parent: nn.Module, down_proj: str | None, *, named: bool
    ) -> ExpertLayer | None:
        """Detect a module of a registered class.

        Raises:
            ValueError: If the class was registered as not supported, or overrides a registered forward.
        """
        refusal = refusal_of(module)
        if refusal is not None:
            raise ValueError(f"the experts {name!r} of {type(module).__name__} are not supported: {refusal}")
        adapter = adapter_of(module)
        return None if adapter is None else self.layer(name, 0, module, adapter.down_proj)

    def layer(self, name: str, index: int, module: nn.Module, down_proj: str) -> ExpertLayer:
        """Describe a module of a registered class."""
        adapter = adapter_of(module)
        if adapter is None or adapter.down_proj != down_proj:
            raise ValueError(
                f"{name!r} is a {type(module).__name__}, which is not registered with down_proj={down_proj!r}; "
                "register it with register_experts"
            )
        try:
            weight = module.get_parameter(down_proj)
            for part in adapter.expert_parameters or ():
                module.get_parameter(part)
            check_down_proj(name, weight)
            shape = tuple(adapter.stacked(module, weight).shape)
        except (AttributeError, RuntimeError) as error:
            raise ValueError(
                f"the experts {name!r} ({type(module).__name__}) do not match their registration ({error}); check the "
                "names given to register_experts"
            ) from error
        if len(shape) != 3:
            raise ValueError(
                f"the down_proj weights of {name!r} have {len(shape)} dimensions; if they are stacked in two, register "
                "the name of the attribute that holds the number of experts (num_experts=...)"
            )
        num_experts, d_in, d_out = shape
        return ExpertLayer(name, index, num_experts, d_in, d_out, self.name, down_proj, adapter.transposed)

    def parameters(self, module: nn.Module, layer: ExpertLayer) -> dict[str, nn.Parameter]:
        """The one parameter with the `down_proj` of all experts."""
        return {layer.down_proj: module.get_parameter(layer.down_proj)}

    def weights(self, model: nn.Module, layer: ExpertLayer) -> dict[str, Tensor]:
        """The effective value of that parameter, including PEFT's `target_parameters` adapters."""
        owner, _, name = f"{layer.name}.{layer.down_proj}".rpartition(".")
        return {layer.down_proj: effective_parameter(model, owner, name)}

    def expert_parameters(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters that were registered as weights of experts, or all."""
        adapter = adapter_of(module)
        assert adapter is not None
        if adapter.expert_parameters is None:
            return dict(module.named_parameters())
        return {name: module.get_parameter(name) for name in adapter.expert_parameters}

    @contextmanager
    def intercepted(
        self, module: nn.Module, layer: ExpertLayer, tap: Tap | None, dropout: Dropout | None
    ) -> Iterator[None]:
        """Replace the module's forward by the registered one."""
        adapter = adapter_of(module)
        assert adapter is not None
        with ExitStack() as stack:
            nested = expert_state(module) is not None
            stack.enter_context(attached_state(module, tap, dropout))
            if not nested:
                name = forward_attribute(module)  # inside accelerate's hooks
                own = module.__dict__.get(name)
                if own is not None and getattr(own, "__func__", None) is not type(module).forward:
                    raise ValueError(
                        f"the forward of the experts {layer.name!r} was replaced on the instance ({own!r}), which the "
                        "registered forward would ignore; register a subclass with that forward"
                    )
                module.__dict__[name] = functools.partial(_run, module, adapter)
                stack.callback(_put_back, module, name, own)
            yield


def _put_back(module: nn.Module, name: str, own: Any) -> None:
    module.__dict__.pop(name)
    if own is not None:
        module.__dict__[name] = own


def _run(module: nn.Module, adapter: ExpertAdapter, *args: Any, **kwargs: Any) -> Any:
    state = expert_state(module)
    if state is None:  # another thread
        return type(module).forward(module, *args, **kwargs)
    output = adapter.forward(module, functools.partial(_down_proj, module, adapter), *args, **kwargs)
    if module not in _AGREED and state.dropout is None:
        with torch.no_grad():
            _compare(module, type(module).forward(module, *args, **kwargs), output)
        _AGREED.add(module)
    return output


def _compare(module: nn.Module, own: Any, registered: Any) -> None:
    """Refuse a registered forward whose outputs differ from those of the module's original forward."""
    pairs = zip(*(x if isinstance(x, tuple) else (x,) for x in (own, registered)), strict=True)
    for expected, found in pairs:
        if not isinstance(expected, Tensor) or not expected.is_floating_point():
            continue
        tolerance = _TOLERANCES.get(expected.dtype, 1e-3)
        scale = torch.linalg.vector_norm(expected.double())
        alike = expected.shape == found.shape
        if not alike or torch.linalg.vector_norm(expected.double() - found.detach().double()) > tolerance * scale:
            raise RuntimeError(
                f"the forward registered for {type(module).__name__} does not compute what its own forward does: norms "
                f"{float(torch.linalg.vector_norm(found.detach().double())):.6g} and {float(scale):.6g}, shapes "
                f"{tuple(found.shape)} and {tuple(expected.shape)}. Is down_proj transposed?"
            )


def _down_proj(
    module: nn.Module,
    adapter: ExpertAdapter,
    hidden: Tensor,
    experts: Tensor,
    tokens: Tensor | None = None,
    num_tokens: int = 0,
) -> Tensor:
    owner, _, name = adapter.down_proj.rpartition(".")
    weight = adapter.stacked(module, materialized(module.get_submodule(owner), name)).to(hidden.device)
    slots = hidden.shape[:-1]
    if hidden.dim() != 2 or hidden.shape[1] != weight.shape[1] or experts.dtype != torch.int64:
        raise ValueError(
            f"down_proj of {type(module).__name__} takes activations [S, {weight.shape[1]}] and int64 experts [S], "
            f"got {tuple(hidden.shape)} and {experts.dtype} {tuple(experts.shape)}"
        )
    if experts.shape != slots or (tokens is not None and tokens.shape != slots):
        raise ValueError(
            f"down_proj of {type(module).__name__} got {len(hidden)} slots, experts {tuple(experts.shape)} and "
            f"tokens {None if tokens is None else tuple(tokens.shape)}"
        )
    groups = ExpertGroups(experts, len(weight))
    sorted_tokens = None if tokens is None else tokens[groups.order]
    return groups.restored(down_proj_product(module, groups, hidden[groups.order], weight, sorted_tokens, num_tokens))


def _qualified_name(kind: Any) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
