"""The weights of expert layers: their parameters, their effective values, and their distance from the prior mean."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bmoe_lightning.experts.fsdp import has_shards, local_part, reshard
from bmoe_lightning.experts.layouts.registry import LAYOUTS
from bmoe_lightning.experts.types import ExpertLayer
from bmoe_lightning.utils.distributed import sum_over_processes


def down_proj_parameters(model: nn.Module, layer: ExpertLayer) -> dict[str, nn.Parameter]:
    """The parameters that hold a layer's `down_proj` weights: qualified name to parameter."""
    module = model.get_submodule(layer.module_name)
    return {f"{layer.module_name}.{name}": p for name, p in LAYOUTS[layer.layout].parameters(module, layer).items()}


def expert_parameters(model: nn.Module, layer: ExpertLayer) -> dict[str, nn.Parameter]:
    """All weights of a layer's experts, without router and shared experts: qualified name to parameter."""
    module = model.get_submodule(layer.module_name)
    return {f"{layer.module_name}.{name}": p for name, p in LAYOUTS[layer.layout].expert_parameters(module).items()}


def down_proj_weights(model: nn.Module, layer: ExpertLayer) -> dict[str, Tensor]:
    """The effective `down_proj` weights of a layer, detached, by the names of `down_proj_parameters`.

    These are the parameters, plus what adapters of PEFT add to them.
    """
    return {f"{layer.module_name}.{name}": w for name, w in LAYOUTS[layer.layout].weights(model, layer).items()}


def squared_distances(
    model: nn.Module, layers: list[ExpertLayer], reference: Mapping[str, Tensor] | None
) -> list[Tensor]:
    """The squared distance of each expert's `down_proj` from the prior mean. A collective if weights are sharded.

    Args:
        model: The model.
        layers: Expert layers of `model`.
        reference: The prior mean by the names of `down_proj_weights`, on any device, unsharded or this rank's shards;
            None is a mean of zero.

    Returns:
        One `[E]` float64 tensor for each layer, on the CPU: `||W_e - M_e||^2`.

    Raises:
        KeyError: If the reference lacks a weight.
    """
    distances = []
    sharded = has_shards(model)
    reshard(model)
    for layer in layers:
        totals = torch.zeros(layer.num_experts, dtype=torch.float64)
        parameters = down_proj_weights(model, layer)
        experts_each = layer.num_experts // len(parameters)
        for position, (name, parameter) in enumerate(parameters.items()):
            part = local_part(parameter)
            if sharded and not part.counts:
                continue
            weight = part.values.to(torch.promote_types(parameter.dtype, torch.float32))
            if reference is not None:
                # One parameter at a time, to limit the memory of the copies. Rounded to the weight's dtype first, so
                # that the rounding of a wider mean does not count as distance.
                mean = part.of(reference[name]).to(weight.device, parameter.dtype)
                weight = weight - mean.to(weight.dtype)
            norms = torch.linalg.vector_norm(weight.flatten(1), dim=1, dtype=torch.float64).cpu()
            # An expert is one row of a stack of matrices, or all rows of a single matrix.
            rows = torch.arange(len(norms)) + (part.offset if part.dim == 0 else 0)
            totals.index_add_(0, position * experts_each + rows * experts_each // len(parameter), norms.square())
        distances.append(totals)
    if sharded:
        sum_over_processes(distances)
    return distances
