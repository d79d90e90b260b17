"""Find the expert layers of a model, by structure or by name."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from bmoe_lightning.experts.correspondence import corresponding_modules
from bmoe_lightning.experts.layouts.registry import LAYOUTS, PLAIN_LINEAR
from bmoe_lightning.experts.layouts.structure import shared_experts_near
from bmoe_lightning.experts.tied_weights import check_tied_weights, weight_ids
from bmoe_lightning.experts.types import ExpertLayer
from bmoe_lightning.experts.wrappers.names import is_wrapped_name
from bmoe_lightning.experts.wrappers.peft import check_lora_matrix
from bmoe_lightning.experts.wrappers.quantised import is_linear

DOWN_PROJ, GATE_UP_PROJ = "down_proj", "gate_up_proj"
PROJECTIONS = (DOWN_PROJ, GATE_UP_PROJ)


def find_expert_layers(
    model: nn.Module,
    *,
    experts: str | None = None,
    down_proj: str | None = None,
    shared_experts: bool = False,
    projections: Sequence[str] = (DOWN_PROJ,),
) -> list[ExpertLayer]:
    """Find the expert layers of any model.

    Detected are modules that use transformers' experts interface (one 3-D parameter for all experts), classes that were
    registered with `register_experts`, and an `nn.ModuleList` or `nn.ModuleDict` of experts whose `down_proj` is an
    `nn.Linear`, with or without adapters of PEFT. The last is found by structure: the experts have equal shapes, each
    holds two or three linear layers of which exactly one maps back to the model's width, and a router with one row for
    each expert lies beside the list.

    Args:
        model: Any module.
        experts: Shell-style pattern over module names (`"*.mlp.experts"`); only matching modules are considered, and no
            router is required.
        down_proj: Name of the second linear layer within one expert (`"w2"`), where its structure is ambiguous.
        shared_experts: Whether experts that see every token are included, as layers with one expert each; in the paper
            (https://arxiv.org/abs/2511.08968) they are not. They are found beside the routed ones by `shared_expert` or
            `shared_mlp` in their names.
        projections: Projections of the experts that are layers: `down_proj`, and `gate_up_proj` for those before the
            activation, whatever their names, which are one layer where one parameter holds them and several otherwise.

    Returns:
        The layers in the order of `model.named_modules()`, of each module those before the activation first.

    Raises:
        ValueError: If no expert layer is found, the `down_proj` of an expert is ambiguous, shared experts are requested
            and there are none, or `down_proj` weights are not supported: quantised, parametrised, sharded other than
            by FSDP2, or tied to anything but the same weights of an equal layer.
    """
    modules = dict(model.named_modules())
    found: dict[str, ExpertLayer] = {}
    seen: set[tuple[int, ...]] = set()
    for name, module in modules.items():
        if experts is not None and not fnmatch.fnmatchcase(name, experts):
            continue
        layer = _detected(name, module, modules, down_proj, named=experts is not None)
        # Tied layers, such as those of an encoder and a decoder, count as one.
        if layer is not None and (weights := weight_ids(module, layer)) not in seen:
            seen.add(weights)
            found[name] = layer
    if not found:
        raise ValueError(_nothing_found(model, modules, experts))
    check_tied_weights(model, found.values())
    if tuple(projections) != (DOWN_PROJ,):
        return _projected(model, found, projections, shared_experts=shared_experts)
    if shared_experts:
        shared = {name for layer in found.values() for name in _shared_experts(layer, modules)}
        if not shared:
            raise ValueError(
                f"{type(model).__name__} has no shared experts beside its {len(found)} expert layers; leave "
                "shared_experts=True out, or name their layers with find_linear_layers"
            )
        found |= {name: PLAIN_LINEAR.layer(name, 0, modules[name], "") for name in shared}
    ordered = [found[name] for name in modules if name in found]
    return [replace(layer, index=index) for index, layer in enumerate(ordered)]


def _projected(
    model: nn.Module, found: Mapping[str, ExpertLayer], projections: Sequence[str], *, shared_experts: bool
) -> list[ExpertLayer]:
    """The layers of the chosen projections of expert layers."""
    unknown = set(projections) - set(PROJECTIONS)
    if unknown or not projections:
        raise ValueError(f"projections must be some of {', '.join(PROJECTIONS)}, got {list(projections)}")
    if shared_experts:
        raise ValueError(
            "shared experts are found with projections=('down_proj',) alone; name their linear layers with LinearLayers"
        )
    layers = []
    for name, layer in found.items():
        module, layout = model.get_submodule(name), LAYOUTS[layer.layout]
        if GATE_UP_PROJ in projections:
            first = [layout.layer(name, 0, module, part) for part in layout.first_projections(module, layer)]
            layers += [part.as_first() for part in first]
        if DOWN_PROJ in projections:
            layers.append(layer)
    check_tied_weights(model, layers)
    return [replace(layer, index=index) for index, layer in enumerate(layers)]


def find_linear_layers(
    model: nn.Module, pattern: str | Sequence[str], *, first_index: int = 0, allow_tied: bool = False
) -> list[ExpertLayer]:
    """Find plain linear layers by name, for a posterior over other layers: each is an expert layer with one expert.

    Attention projections (`"*.self_attn.?_proj"`), the matrices of LoRA (`"*.lora_[AB].default"`), dense MLPs and heads
    are supported that way.

    Args:
        model: Any module.
        pattern: Shell-style pattern over module names, or several.
        first_index: Index of the first layer; to combine the layers with other ones, the number of those.
        allow_tied: Whether a weight that other modules use too (a head tied to the embeddings) is accepted. The
            posterior is then over the layer's use of the weight, as if that were a copy.

    Returns:
        The layers in the order of `model.named_modules()`.

    Raises:
        ValueError: If no linear layer matches, or one that does is quantised, tied to another module without
            `allow_tied`, or a matrix of PEFT that does not run as a layer.
    """
    patterns = [pattern] if isinstance(pattern, str) else list(pattern)
    if not patterns:
        raise ValueError("find_linear_layers got no pattern; pass a pattern over module names")
    modules = dict(model.named_modules())
    linears = {name: module for name, module in modules.items() if is_linear(module) and not is_wrapped_name(name)}
    names = [name for name in linears if any(fnmatch.fnmatchcase(name, p) for p in patterns)]
    if not names:
        raise ValueError(
            f"no linear layer of {type(model).__name__} matches {' or '.join(map(repr, patterns))}; there are "
            f"{len(linears)}, such as {', '.join(list(linears)[:5]) or 'none'}"
        )
    found = [PLAIN_LINEAR.layer(name, index, linears[name], "") for index, name in enumerate(names, first_index)]
    for layer in found:
        check_lora_matrix(layer.name, modules)
        if isinstance(linears[layer.name], NonDynamicallyQuantizableLinear):
            raise ValueError(
                f"{layer.name!r} belongs to an nn.MultiheadAttention, which multiplies with its weight and never runs "
                "it as a layer; choose other layers"
            )
    if not allow_tied:
        check_tied_weights(model, found)
    return found


def locate_expert_layers(model: nn.Module, layers: Sequence[ExpertLayer]) -> list[ExpertLayer]:
    """Locate layers in another model: a copy, a module that contains it, or a part of it.

    The names may differ in what stands before their common end (`model.layers.0.mlp.experts` inside a LightningModule,
    or under another attribute), in the same way for all layers, and by wrappers.

    Args:
        model: Any module.
        layers: Layers as `find_expert_layers` or `find_linear_layers` returned them.

    Returns:
        The layers of this model in the given order, with its names and sizes and the given indices.

    Raises:
        ValueError: If a layer is missing, or the layers are found in several places.
    """
    found = corresponding_modules(model, [layer.module_name for layer in layers], "expert layers")
    return [_located(model, names, layer) for names, layer in zip(found, layers, strict=True)]


def _located(model: nn.Module, names: Sequence[str], layer: ExpertLayer) -> ExpertLayer:
    reasons = []
    for name in names:  # a module and its wrappers, outermost first
        try:
            found = LAYOUTS[layer.layout].layer(name, layer.index, model.get_submodule(name), layer.down_proj)
            return found.as_first() if layer.is_first else found
        except ValueError as error:
            reasons.append(str(error))
    raise ValueError(
        f"{names[-1]!r} of {type(model).__name__} does not hold experts as {layer.name!r} did ({layer.layout}, "
        f"down_proj {layer.down_proj!r}): {reasons[-1]}"
    )


def _shared_experts(layer: ExpertLayer, modules: dict[str, nn.Module]) -> list[str]:
    return shared_experts_near(layer, modules, may_hold_block=LAYOUTS[layer.layout].may_hold_block)


def _detected(
    name: str, module: nn.Module, modules: dict[str, nn.Module], down_proj: str | None, *, named: bool
) -> ExpertLayer | None:
    """The expert layer that a module holds in one of the layouts, or None."""
    parent = modules[name.rpartition(".")[0]]
    for layout in LAYOUTS.values():
        layer = layout.detect(name, module, parent, down_proj, named=named)
        if layer is not None:
            return layer
    return None


def _nothing_found(model: nn.Module, modules: dict[str, nn.Module], experts: str | None) -> str:
    lists = [name for name, module in modules.items() if isinstance(module, (nn.ModuleList, nn.ModuleDict))]
    pattern = f" matching {experts!r}" if experts is not None else ""
    return (
        f"{type(model).__name__} has no expert layers{pattern}. Supported are "
        f"{'; '.join(layout.description for layout in LAYOUTS.values())}. Lists of modules in this model: "
        f"{sorted(lists) or 'none'}. If one of them holds the experts, name it with experts='pattern', and the second "
        "linear layer of its experts with down_proj='name'; experts in one module of another class can be registered"
    )
