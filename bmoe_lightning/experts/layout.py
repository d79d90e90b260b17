"""Where the expert layers of a model are: fused 3-D weights of transformers, or a `ModuleList` of small MLPs."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ExpertLayer:
    """The second linear layers of all experts of one MoE layer.

    Attributes:
        name: qualified name of the module that holds the experts, as in `model.named_modules()`.
        index: position among the expert layers of the model, from 0, in the order of `named_modules()`.
        num_experts: E.
        d_in: width of the activation that enters the second linear layer.
        d_out: width of its output.
        layout: `"fused"` (one parameter `[E, d_out, d_in]`, or its transpose) or `"modules"` (one `nn.Linear` an
            expert).
        down_proj: name of the second linear layer, relative to the experts' module (fused) or to an expert (modules).
        transposed: whether a fused weight is stored as `[E, d_in, d_out]`.
    """

    name: str
    index: int
    num_experts: int
    d_in: int
    d_out: int
    layout: Literal["fused", "modules"]
    down_proj: str
    transposed: bool = False


def find_expert_layers(
    model: nn.Module, *, experts: str | None = None, down_proj: str | None = None
) -> list[ExpertLayer]:
    """Find the expert layers of any model.

    Two layouts are known: modules of transformers 5 that go through its experts interface (one 3-D parameter for all
    experts), and an `nn.ModuleList` of experts whose second layer is an `nn.Linear`. The latter is found by structure:
    the experts are alike, each holds two or three linear layers of which exactly one leads back to the model's width,
    and a router with one row an expert stands beside the list.

    Args:
        model: any module.
        experts: shell-style pattern over module names (`"*.mlp.experts"`); only matching modules are considered, and
            the router's presence is not asked for.
        down_proj: name of the second linear layer within one expert (`"w2"`), where structure leaves it open.

    Returns:
        The layers in the order of `model.named_modules()`.

    Raises:
        ValueError: if no expert layer is found, or if an expert's second linear layer is ambiguous.
    """
    found: list[ExpertLayer] = []
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if experts is not None and not fnmatch.fnmatchcase(name, experts):
            continue
        if is_fused_experts(module):
            found.append(_fused_layer(name, len(found), module))
        elif isinstance(module, nn.ModuleList) and len(module) > 1:
            widths = _router_widths(modules[name.rpartition(".")[0]], module)
            if experts is None and not widths:
                continue
            second = _second_linear_name(name, module, widths, down_proj, named=experts is not None)
            if second is not None:
                found.append(_module_list_layer(name, len(found), module, second))
    if not found:
        raise ValueError(_nothing_found(model, modules, experts))
    return found


def locate_expert_layers(model: nn.Module, layers: Sequence[ExpertLayer]) -> list[ExpertLayer]:
    """Find known layers again, in the model they were found in, in a module that holds it, or in one that it held.

    The names differ then by a prefix alone (`model.layers.0.mlp.experts` inside a LightningModule).

    Args:
        model: any module.
        layers: as `find_expert_layers` gave them, whether found by structure or named by the user.

    Returns:
        For each layer, in order, the one of this model: its own name and sizes, the index that was given.

    Raises:
        ValueError: if a layer is not there, or in several places.
    """
    modules = dict(model.named_modules())
    return [_located(model, modules, layer) for layer in layers]


def _located(model: nn.Module, modules: dict[str, nn.Module], layer: ExpertLayer) -> ExpertLayer:
    names = [layer.name] if layer.name in modules else [name for name in modules if _alike(name, layer.name)]
    if len(names) != 1:
        raise ValueError(
            f"{type(model).__name__} has {'several' if names else 'no'} expert layers called {layer.name!r}, with or "
            f"without a prefix{': ' + ', '.join(names) if names else ''}"
        )
    module = modules[names[0]]
    if layer.layout == "fused" and is_fused_experts(module):
        return _fused_layer(names[0], layer.index, module)
    if layer.layout == "modules" and isinstance(module, nn.ModuleList):
        inside = dict(module[0].named_modules())
        if isinstance(inside.get(layer.down_proj), nn.Linear):
            return _module_list_layer(names[0], layer.index, module, layer.down_proj)
    raise ValueError(
        f"{names[0]!r} of {type(model).__name__} does not hold experts as {layer.name!r} did ({layer.layout}, second "
        f"linear layer {layer.down_proj!r})"
    )


def _alike(name: str, other: str) -> bool:
    return bool(name) and (name.endswith(f".{other}") or other.endswith(f".{name}"))


def is_fused_experts(module: nn.Module) -> bool:
    """Whether a module holds all experts in 3-D parameters and is dispatched by transformers' experts interface."""
    weight = getattr(module, "down_proj", None)
    return isinstance(weight, nn.Parameter) and weight.dim() == 3 and hasattr(module, "is_transposed")


def down_proj_parameters(model: nn.Module, layer: ExpertLayer) -> dict[str, nn.Parameter]:
    """The parameters that hold a layer's second weights: qualified name to parameter."""
    module = model.get_submodule(layer.name)
    if layer.layout == "fused":
        return {f"{layer.name}.{layer.down_proj}": getattr(module, layer.down_proj)}
    assert isinstance(module, nn.ModuleList)
    return {
        f"{layer.name}.{expert}.{layer.down_proj}.weight": submodule.get_parameter(f"{layer.down_proj}.weight")
        for expert, submodule in enumerate(module)
    }


def squared_distances(model: nn.Module, layers: list[ExpertLayer], reference: dict[str, Tensor] | None) -> list[Tensor]:
    """Measure how far each expert's second weight is from the prior mean.

    Args:
        model: the model.
        layers: expert layers of `model`.
        reference: the prior mean as qualified parameter name to tensor, on any device; `None` is a mean of zero.

    Returns:
        One `[E]` float64 tensor a layer, on the CPU: `||W_e - M_e||^2`.

    Raises:
        KeyError: if the reference lacks a parameter.
    """
    distances = []
    for layer in layers:
        parts = []
        for name, parameter in down_proj_parameters(model, layer).items():
            weight = parameter.detach()
            weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
            if reference is not None:
                # One parameter at a time: the prior mean never has a second full copy beside the weights.
                # Through the weight's own dtype: what rounding a wider mean costs is no movement.
                weight = weight - reference[name].to(weight.device, parameter.dtype).to(weight.dtype)
            norms = torch.linalg.vector_norm(
                weight.flatten(1) if weight.dim() == 3 else weight.reshape(1, -1), dim=1, dtype=torch.float64
            )
            parts.append(norms.square().cpu())
        distances.append(torch.cat(parts))
    return distances


def _fused_layer(name: str, index: int, module: nn.Module) -> ExpertLayer:
    transposed = bool(module.is_transposed)
    weight = module.down_proj
    assert isinstance(weight, nn.Parameter)
    num_experts, first, second = weight.shape
    d_out, d_in = (second, first) if transposed else (first, second)
    return ExpertLayer(name, index, num_experts, d_in, d_out, "fused", "down_proj", transposed)


def _module_list_layer(name: str, index: int, experts: nn.ModuleList, down_proj: str) -> ExpertLayer:
    linear = experts[0].get_submodule(down_proj)
    assert isinstance(linear, nn.Linear)
    return ExpertLayer(name, index, len(experts), linear.in_features, linear.out_features, "modules", down_proj)


def _router_widths(parent: nn.Module, experts: nn.ModuleList) -> set[int]:
    """The widths that a router beside the experts may have: a matrix with one row (or column) an expert; maybe none."""
    own = {id(parameter) for parameter in experts.parameters()}
    shapes = [p.shape for p in parent.parameters() if p.dim() == 2 and id(p) not in own]
    return {shape[1 - side] for shape in shapes for side in (0, 1) if shape[side] == len(experts)}


def _second_linear_name(
    name: str, experts: nn.ModuleList, widths: set[int], down_proj: str | None, *, named: bool
) -> str | None:
    """The name of the second linear layer inside every expert of a list, or None if the list holds no experts."""
    shapes = [{n: tuple(m.weight.shape) for n, m in e.named_modules() if isinstance(m, nn.Linear)} for e in experts]
    if any(shape != shapes[0] for shape in shapes[1:]):
        return None
    linears = shapes[0]
    if down_proj is not None:
        if down_proj in linears:
            return down_proj
        if named:
            raise ValueError(f"experts of {name!r} have no linear layer {down_proj!r}; they have {sorted(linears)}")
        return None
    if not 2 <= len(linears) <= 3:
        return None
    if isinstance(experts[0], nn.Sequential):
        return list(linears)[-1]
    candidates = [
        n
        for n, (d_out, d_in) in linears.items()
        if all(shape == (d_in, d_out) for other, shape in linears.items() if other != n)
    ]
    if len(candidates) > 1:
        # Of two layers each leads back to where the other starts; the router knows the model's width.
        back = [n for n in candidates if linears[n][0] in widths and linears[n][1] not in widths]
        if len(back) != 1:
            raise ValueError(
                f"the shapes of the linear layers of the experts in {name!r} do not tell which one comes second; name "
                f"it: down_proj=one of {sorted(linears)}"
            )
        return back[0]
    return candidates[0] if candidates else None


def _nothing_found(model: nn.Module, modules: dict[str, nn.Module], experts: str | None) -> str:
    lists = sorted(name for name, module in modules.items() if isinstance(module, nn.ModuleList))
    pattern = f" matching {experts!r}" if experts is not None else ""
    return (
        f"{type(model).__name__} has no expert layers{pattern}. Supported are fused experts of transformers' experts "
        "interface and an nn.ModuleList of experts with two or three nn.Linear each beside a router. Lists of modules "
        f"in this model: {lists or 'none'}. If one of them holds the experts, name it with experts='pattern' and its "
        "second linear layer with down_proj='name'."
    )
