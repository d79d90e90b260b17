"""Where the expert layers of a model are."""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from bmoe_lightning.experts.fsdp import has_shards, local_part, reshard
from bmoe_lightning.experts.layouts.fused import check_overlooked, fused_implementation, is_fused_experts
from bmoe_lightning.experts.layouts.registered import adapter_of, refusal_of
from bmoe_lightning.experts.layouts.registry import LAYOUTS
from bmoe_lightning.experts.layouts.structure import second_linear_name, shared_experts_near
from bmoe_lightning.experts.tied_weights import check_ties, parameter_owners, tied_modules, weight_ids
from bmoe_lightning.experts.types import Dropout, ExpertLayer, Tap
from bmoe_lightning.experts.wrappers import check_adapter_part, is_linear, is_wrapped_name, plain_name
from bmoe_lightning.utils.distributed import sum_over_processes


def find_expert_layers(
    model: nn.Module, *, experts: str | None = None, down_proj: str | None = None, shared_experts: bool = False
) -> list[ExpertLayer]:
    """Find the expert layers of any model.

    Three layouts are known: modules of transformers 5 that go through its experts interface (one 3-D parameter for all
    experts), classes that `register_experts` was told of, and an `nn.ModuleList` or `nn.ModuleDict` of experts whose
    second layer is an `nn.Linear`, also one that PEFT wrapped. The last is found by structure: the experts are alike,
    each holds two or three linear layers of which exactly one leads back to the model's width, and a router with one
    row an expert stands beside the list.

    Args:
        model: any module.
        experts: shell-style pattern over module names (`"*.mlp.experts"`); only matching modules are considered, and
            the router's presence is not asked for.
        down_proj: name of the second linear layer within one expert (`"w2"`), where structure leaves it open.
        shared_experts: whether experts that see every token are included, as layers with one expert each; in the paper
            they are not. They are found beside the routed ones by `shared_expert` or `shared_mlp` in their names.

    Returns:
        The layers in the order of `model.named_modules()`.

    Raises:
        ValueError: if no expert layer is found, an expert's second linear layer is ambiguous, shared experts are asked
            for and there are none, or second weights are out of reach: quantised, parametrised, spread over processes
            other than by FSDP2, or tied to something that is no second weight at the same place.
    """
    modules = dict(model.named_modules())
    found: dict[str, ExpertLayer] = {}
    known: set[tuple[int, ...]] = set()
    for name, module in modules.items():
        if experts is not None and not fnmatch.fnmatchcase(name, experts):
            continue
        layer = _expert_layer(name, module, modules, down_proj, named=experts is not None)
        if layer is None:
            check_overlooked(name, module)
        # Tied layers, such as those of an encoder and a decoder, are one.
        elif (weights := weight_ids(module, layer)) not in known:
            known.add(weights)
            found[name] = layer
    if not found:
        raise ValueError(_nothing_found(model, modules, experts))
    check_ties(model, found.values())
    if shared_experts:
        shared = {name for layer in found.values() for name in shared_experts_near(layer, modules)}
        if not shared:
            raise ValueError(f"{type(model).__name__} has no shared experts beside its {len(found)} expert layers")
        found |= {name: LAYOUTS["linear"].layer(name, 0, modules[name], "") for name in shared}
    ordered = [found[name] for name in modules if name in found]
    return [replace(layer, index=index) for index, layer in enumerate(ordered)]


def find_linear_layers(model: nn.Module, pattern: str | Sequence[str], *, first_index: int = 0) -> list[ExpertLayer]:
    """Find plain linear layers by name, to put the posterior elsewhere: each is an expert layer with one expert.

    Attention projections (`"*.self_attn.?_proj"`), the matrices of LoRA (`"*.lora_[AB].default"`), dense MLPs and heads
    take part in the same engine that way.

    Args:
        model: any module.
        pattern: shell-style pattern over module names, or several.
        first_index: index of the first layer; give the number of layers found before to use both together.

    Returns:
        The layers in the order of `model.named_modules()`.

    Raises:
        ValueError: if no linear layer matches, or one that does is quantised, tied to something else, or used by PEFT
            in other ways than as a layer.
    """
    patterns = [pattern] if isinstance(pattern, str) else list(pattern)
    if not patterns:
        raise ValueError("find_linear_layers needs a pattern over module names, got none")
    modules = dict(model.named_modules())
    linears = {name: module for name, module in modules.items() if is_linear(module) and not is_wrapped_name(name)}
    names = [name for name in linears if any(fnmatch.fnmatchcase(name, p) for p in patterns)]
    if not names:
        raise ValueError(
            f"no linear layer of {type(model).__name__} matches {' or '.join(map(repr, patterns))}; there are "
            f"{len(linears)}, such as {', '.join(list(linears)[:5]) or 'none'}"
        )
    found = [LAYOUTS["linear"].layer(name, index, linears[name], "") for index, name in enumerate(names, first_index)]
    for layer in found:
        check_adapter_part(layer.name, modules)
        if isinstance(linears[layer.name], NonDynamicallyQuantizableLinear):
            raise ValueError(
                f"{layer.name!r} belongs to an nn.MultiheadAttention, which multiplies with its weight and never runs "
                "it as a layer"
            )
    check_ties(model, found)
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
    plain = plain_name(layer.name)
    names = [name for name in modules if plain_name(name) == plain] or [name for name in modules if _alike(name, plain)]
    if len({plain_name(name) for name in names}) != 1:
        raise ValueError(
            f"{type(model).__name__} has {'several' if names else 'no'} expert layers called {layer.name!r}, with or "
            f"without a prefix{': ' + ', '.join(names) if names else ''}"
        )
    reasons = []
    for name in names:  # a module and its wrappers, the outermost first
        try:
            return LAYOUTS[layer.layout].layer(name, layer.index, modules[name], layer.down_proj)
        except ValueError as error:
            reasons.append(str(error))
    raise ValueError(
        f"{names[-1]!r} of {type(model).__name__} does not hold experts as {layer.name!r} did ({layer.layout}, second "
        f"linear layer {layer.down_proj!r}): {reasons[-1]}"
    )


def _alike(name: str, other: str) -> bool:
    """Whether two names differ by a prefix, or by what wrappers add, alone."""
    name = plain_name(name)
    return bool(name) and (name.endswith(f".{other}") or other.endswith(f".{name}"))


@contextmanager
def intercepted_layers(
    model: nn.Module,
    layers: Sequence[ExpertLayer],
    *,
    taps: Sequence[Tap] | None = None,
    dropout: Dropout | None = None,
) -> Iterator[None]:
    """Drop activations before the second linear layers of some expert layers, or hand their slots to taps.

    The model is as it was afterwards, also after an exception.

    Args:
        model: the model.
        layers: some of its expert layers.
        taps: one a layer.
        dropout: applied to the input of every second linear layer.
    """
    with ExitStack() as stack:
        if any(layer.layout == "fused" for layer in layers):
            stack.enter_context(fused_implementation(model))
        owners = parameter_owners(model)
        for layer, tap in zip(layers, itertools.repeat(None) if taps is None else taps, strict=taps is not None):
            for module in tied_modules(model, layer, owners):
                stack.enter_context(LAYOUTS[layer.layout].intercepted(module, layer, tap, dropout))
        yield


def down_proj_parameters(model: nn.Module, layer: ExpertLayer) -> dict[str, nn.Parameter]:
    """The parameters that hold a layer's second weights: qualified name to parameter."""
    module = model.get_submodule(layer.name)
    return {f"{layer.name}.{name}": p for name, p in LAYOUTS[layer.layout].parameters(module, layer).items()}


def expert_parameters(model: nn.Module, layer: ExpertLayer) -> dict[str, nn.Parameter]:
    """All weights of a layer's experts, without router and shared experts: qualified name to parameter."""
    module = model.get_submodule(layer.name)
    return {f"{layer.name}.{name}": p for name, p in LAYOUTS[layer.layout].expert_parameters(module).items()}


def down_proj_weights(model: nn.Module, layer: ExpertLayer) -> dict[str, Tensor]:
    """What a layer's second linear layers multiply with, detached, by the names of `down_proj_parameters`.

    These are the parameters themselves, unless PEFT's adapters add to them.
    """
    return {f"{layer.name}.{name}": w for name, w in LAYOUTS[layer.layout].weights(model, layer).items()}


def squared_distances(
    model: nn.Module, layers: list[ExpertLayer], reference: Mapping[str, Tensor] | None
) -> list[Tensor]:
    """Measure how far each expert's second weight is from the prior mean.

    Where weights are sharded, each process adds its part, and all of them call this.

    Args:
        model: the model.
        layers: expert layers of `model`.
        reference: the prior mean as in `down_proj_weights`, on any device, whole or of this process's parts; `None`
            is a mean of zero.

    Returns:
        One `[E]` float64 tensor a layer, on the CPU: `||W_e - M_e||^2`.

    Raises:
        KeyError: if the reference lacks a weight.
    """
    distances = []
    sharded = has_shards(model)
    reshard(model)
    for layer in layers:
        totals = torch.zeros(layer.num_experts, dtype=torch.float64)
        seconds = down_proj_weights(model, layer)
        held = layer.num_experts // len(seconds)  # experts in one parameter
        for position, (name, second) in enumerate(seconds.items()):
            part = local_part(second)
            if sharded and not part.counts:
                continue
            weight = part.values.to(torch.promote_types(second.dtype, torch.float32))
            if reference is not None:
                # One parameter at a time: the prior mean never has a second full copy beside the weights.
                # Through the weight's own dtype: what rounding a wider mean costs is no movement.
                mean = part.of(reference[name]).to(weight.device, second.dtype)
                weight = weight - mean.to(weight.dtype)
            norms = torch.linalg.vector_norm(weight.flatten(1), dim=1, dtype=torch.float64).cpu()
            # An expert has one row of a stack of matrices, and as many of a matrix.
            rows = torch.arange(len(norms)) + (part.offset if part.dim == 0 else 0)
            totals.index_add_(0, position * held + rows * held // len(second), norms.square())
        distances.append(totals)
    if sharded:
        sum_over_processes(distances)
    return distances


def _expert_layer(
    name: str, module: nn.Module, modules: dict[str, nn.Module], down_proj: str | None, *, named: bool
) -> ExpertLayer | None:
    if is_fused_experts(module):
        return LAYOUTS["fused"].layer(name, 0, module, "down_proj")
    if refusal_of(module) is not None:
        raise ValueError(f"the experts {name!r} of {type(module).__name__} are not supported: {refusal_of(module)}")
    adapter = adapter_of(module)
    if adapter is not None:
        return LAYOUTS["adapted"].layer(name, 0, module, adapter.down_proj)
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        second = second_linear_name(name, module, modules[name.rpartition(".")[0]], down_proj, named=named)
        return None if second is None else LAYOUTS["modules"].layer(name, 0, module, second)
    return None


def _nothing_found(model: nn.Module, modules: dict[str, nn.Module], experts: str | None) -> str:
    lists = [name for name, module in modules.items() if isinstance(module, (nn.ModuleList, nn.ModuleDict))]
    pattern = f" matching {experts!r}" if experts is not None else ""
    return (
        f"{type(model).__name__} has no expert layers{pattern}. Supported are fused experts of transformers' experts "
        "interface, classes that register_experts was told of, and an nn.ModuleList or nn.ModuleDict of experts with "
        f"two or three nn.Linear each beside a router. Lists of modules in this model: {sorted(lists) or 'none'}. If "
        "one of them holds the experts, name it with experts='pattern' and its second linear layer with "
        "down_proj='name'; experts in one module of another form can be registered; plain layers are "
        "found by find_linear_layers."
    )
