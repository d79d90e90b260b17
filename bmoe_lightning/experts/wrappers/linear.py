"""Linear layers and expert weights inside wrappers: their shapes, names and effective values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bmoe_lightning.experts.fsdp import is_sharded, unsharded_class
from bmoe_lightning.experts.wrappers.accelerate import execution_device, materialized
from bmoe_lightning.experts.wrappers.names import inner_name, is_wrapped_name, unwrapped
from bmoe_lightning.experts.wrappers.peft import adapted_parameter, has_parameter_deltas, parameter_deltas
from bmoe_lightning.experts.wrappers.quantised import is_linear

_ADAPTED_SHARDS = (
    "the down_proj weights have adapters of PEFT and are sharded, so no process has their sum; merge the adapters "
    "into the weights, leave these weights unsharded, or use methods without an evidence"
)


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """`(d_out, d_in)` of a linear layer; a packed weight has another shape."""
    linear: Any = unwrapped(module)
    return linear.out_features, linear.in_features


def linears_of(module: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
    """The linear layers of a module by name, in order; a wrapped layer has the name of its outermost wrapper."""
    if is_linear(module):
        return {prefix: module}
    found: dict[str, nn.Module] = {}
    for name, child in module.named_children():
        found |= linears_of(child, f"{prefix}.{name}" if prefix else name)
    return found


def has_linears(module: nn.Module) -> bool:
    """Whether `linears_of` finds any; it stops at the first."""
    return is_linear(module) or any(map(has_linears, module.children()))


def linear_weight_name(module: nn.Module) -> str:
    """The name of a linear layer's weight, relative to its outermost wrapper."""
    inner = inner_name(module)
    if inner is None:
        return "weight"
    return f"{inner}.{linear_weight_name(module.get_submodule(inner))}"


@torch.no_grad()
def effective_weight(module: nn.Module) -> Tensor:
    """The effective weight of a linear layer, `[d_out, d_in]`, detached, adapters included.

    A wrapped layer is evaluated at the unit vectors and, for its bias, at zero.

    Raises:
        ValueError: If it has adapters and is sharded, or is on the meta device.
    """
    if unsharded_class(module) is nn.Linear:
        return materialized(module, "weight").detach()
    linear: Any = unwrapped(module)
    weight = linear.weight
    if is_sharded(weight):
        raise ValueError(_ADAPTED_SHARDS)
    device = weight.device if weight.device.type != "meta" else execution_device(linear)
    if device.type == "meta":
        materialized(linear, "weight")  # raises
    basis = torch.eye(linear.in_features + 1, linear.in_features, dtype=weight.dtype, device=device)
    modes = [(child, child.training) for child in module.modules()]
    module.eval()  # without LoRA's dropout
    try:
        outputs = module(basis)
    finally:
        for child, training in modes:
            child.training = training
    return (outputs[:-1] - outputs[-1]).T


def effective_parameter(model: nn.Module, name: str, parameter: str) -> Tensor:
    """The effective value of a parameter of an experts module, with PEFT's `target_parameters` adapters, detached.

    Args:
        model: The model.
        name: Name of the module, `...experts.base_layer` where PEFT wrapped it.
        parameter: Name of the parameter in the module.

    Raises:
        ValueError: If it has adapters and is sharded, or is on the meta device.
    """
    weight = materialized(model.get_submodule(name), parameter).detach()
    added = _added_by_adapters(model, name, parameter)
    return weight if added is None else weight + added.to(weight)


def _added_by_adapters(model: nn.Module, name: str, parameter: str) -> Tensor | None:
    """The sum of the active adapters of a parameter, in its shape, or None if there are none."""
    total = None
    while is_wrapped_name(name):
        name = name.rpartition(".")[0]
        wrapper: Any = model.get_submodule(name)
        if adapted_parameter(wrapper) != parameter or not has_parameter_deltas(wrapper):
            continue
        if is_sharded(getattr(wrapper.get_base_layer(), parameter)):
            raise ValueError(_ADAPTED_SHARDS)
        for delta in parameter_deltas(wrapper):
            total = delta if total is None else total + delta
    return total
