"""Find the routers of a model: by the classes that transformers names, by structure, or by name."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from torch import nn

from bmoe_lightning.experts.correspondence import corresponding_modules
from bmoe_lightning.experts.discovery import find_expert_layers
from bmoe_lightning.experts.layouts.registry import LAYOUTS
from bmoe_lightning.experts.types import ExpertLayer
from bmoe_lightning.experts.wrappers.names import unwrapped
from bmoe_lightning.experts.wrappers.transformers import is_kernel, recorded_router_classes
from bmoe_lightning.routers.structure import Shape, router_shape
from bmoe_lightning.routers.types import Router
from bmoe_lightning.utils.messages import first_names

_REMEDY = "name the modules of the routers with routers='pattern'"


def find_routers(
    model: nn.Module, *, routers: str | None = None, layers: Sequence[ExpertLayer] | None = None
) -> list[Router]:
    """Find the router of every expert layer of a model.

    A router is a module beside the experts, or in the block around theirs, with a linear map to one logit for each
    expert: an `nn.Linear`, or a module that holds one, or its weight. Where the model's class names the classes of its
    routers for transformers' `output_router_logits`, only those are considered. Nothing is run, so `top_k` and `score`
    are None; `probe_routers` measures them on a batch.

    Args:
        model: Any module.
        routers: Shell-style pattern over module names (`"*.mlp.gate"`); only matching modules are considered, and
            expert layers beside which none matches are left out.
        layers: Expert layers of the model, as `find_expert_layers` returned them; None finds them.

    Returns:
        The routers in the order of their expert layers; one that several expert layers share is there once.

    Raises:
        ValueError: If the model has no expert layers, an expert layer has no router or several modules that may be it,
            or the block around it was replaced by a kernel from the hub.
    """
    layers = find_expert_layers(model) if layers is None else layers
    modules = dict(model.named_modules(remove_duplicate=False))  # a module may be the router of several layers
    recorded = recorded_router_classes(model)
    experts = {layer.module_name for layer in layers}
    found: dict[int, Router] = {}
    for layer in layers:
        router = _router_of(layer, modules, experts, recorded, routers)
        if router is not None:
            found.setdefault(id(modules[router.name]), router)
        elif routers is None:
            raise ValueError(
                f"no router was found beside the experts {layer.name!r} of {type(model).__name__}: no module in the "
                f"block around them has a linear layer, or a matrix, with {layer.num_experts} outputs; {_REMEDY}"
            )
    if not found:
        raise ValueError(
            f"no module beside the experts of {type(model).__name__} that matches {routers!r} has a linear layer, or a "
            f"matrix, with one output for each expert; its expert layers are {first_names(experts)}"
        )
    for router in found.values():
        _check_runs(router, modules)
    return [replace(router, index=index) for index, router in enumerate(found.values())]


def locate_routers(model: nn.Module, routers: Sequence[Router]) -> list[Router]:
    """Locate routers in another model: a copy, a module that contains it, or a part of it.

    The names may differ in what stands before their common end, in the same way for all routers, and by wrappers.

    Args:
        model: Any module.
        routers: Routers as `find_routers` or `probe_routers` returned them.

    Returns:
        The routers of this model in the given order, with its names and everything else as given.

    Raises:
        ValueError: If a router or its experts are missing or have other sizes, or they are found in several places.
    """
    names = corresponding_modules(model, [router.name for router in routers], "routers")
    experts = corresponding_modules(model, [router.experts for router in routers], "expert layers")
    located = []
    for router, at, of_layer in zip(routers, names, experts, strict=True):
        shape = router.num_experts, router.d_in
        if shape not in router_shape(model.get_submodule(at[0]), router.num_experts, more=False):
            raise ValueError(
                f"{at[0]!r} of {type(model).__name__} has no linear layer, or matrix, of {shape[0]} x {shape[1]} as "
                f"the router {router.name!r} has; pass the model that the routers were found in"
            )
        located.append(replace(router, name=at[0], experts=of_layer[-1]))
    return located


def _router_of(
    layer: ExpertLayer,
    modules: Mapping[str, nn.Module],
    experts: set[str],
    recorded: tuple[type[nn.Module], ...],
    pattern: str | None,
) -> Router | None:
    """The router of an expert layer; None if there is none."""
    for scope in _scopes(layer, modules):
        candidates = list(_candidates(scope, modules, experts, pattern))
        named = [name for name in candidates if _holds(modules[name], recorded)]
        # A class that transformers names may have more logits than there are experts.
        for names, more in ((named, False), (named, True), (candidates, False), (candidates, pattern is not None)):
            shapes = {name: router_shape(modules[name], layer.num_experts, more=more) for name in names}
            shapes = {name: found for name, found in shapes.items() if found}
            if shapes:
                name, (num_experts, d_in) = _only(layer, shapes)
                return Router(name, 0, num_experts, d_in, layer.module_name)
    return None


def _scopes(layer: ExpertLayer, modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """The names of the modules that may hold the router of an expert layer, the nearest first."""
    if LAYOUTS[layer.layout].may_hold_block:
        yield layer.module_name
    scope = layer.module_name
    for _ in range(2):
        if not scope:
            return
        scope = scope.rpartition(".")[0]
        if isinstance(modules[scope], (nn.ModuleList, nn.ModuleDict)):
            return
        yield scope


def _candidates(scope: str, modules: Mapping[str, nn.Module], experts: set[str], pattern: str | None) -> Iterator[str]:
    """The modules below a scope that may be a router: its children, or those that match a pattern.

    Experts are none of them, nor is what holds any.
    """
    for child, _ in modules[scope].named_children():
        name = f"{scope}.{child}" if scope else child
        if name in experts:
            continue
        holds_experts = any(other.startswith(f"{name}.") for other in experts)
        if pattern is None:
            if not holds_experts:
                yield name
        elif fnmatch.fnmatchcase(name, pattern) and not holds_experts:
            yield name
        else:
            yield from _candidates(name, modules, experts, pattern)


def _holds(module: nn.Module, recorded: tuple[type[nn.Module], ...]) -> bool:
    return any(isinstance(inner, recorded) for inner in module.modules())


def _only(layer: ExpertLayer, shapes: Mapping[str, Sequence[Shape]]) -> tuple[str, Shape]:
    """The one candidate and its shape; of several, the one that takes inputs of the model's width."""
    found = [(name, shape) for name, of_module in shapes.items() for shape in of_module]
    if len(found) > 1:
        found = [(name, shape) for name, shape in found if shape[1] == layer.d_out] or found
    if len(found) > 1:
        raise ValueError(
            f"{len(found)} linear maps beside the experts {layer.name!r} have {found[0][1][0]} outputs, in "
            f"{first_names({name for name, _ in found})}, so their shapes do not tell which one is the router; "
            f"{_REMEDY}"
        )
    return found[0]


def _check_runs(router: Router, modules: Mapping[str, nn.Module]) -> None:
    """Refuse a router that a kernel passes over."""
    for name in _ancestors(router.name):
        if is_kernel(modules[name]):
            raise ValueError(
                f"the forward of {name or 'the model'!r} ({type(unwrapped(modules[name])).__name__}) was replaced by a "
                f"kernel from the hub, which never runs its router {router.name!r} as a module; load the model with "
                "use_kernels=False"
            )


def _ancestors(name: str) -> Iterable[str]:
    """The names of a module and of those that hold it."""
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""
