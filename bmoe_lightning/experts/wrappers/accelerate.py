"""Weights that accelerate offloads to main memory or disk: https://github.com/huggingface/accelerate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def offload_hook(module: nn.Module) -> Any:
    """The hook that accelerate attached to a module, or None.

    Reads `_hf_hook` (seen in accelerate 1.0.0 to 1.15.0).
    """
    return getattr(module, "_hf_hook", None)


def offloaded_weights(module: nn.Module) -> Mapping[str, Tensor] | None:
    """The offloaded parameters of a module by name, or None if it has none.

    Reads `AlignDevicesHook.weights_map`, and `SequentialHook.hooks` of a module that was offloaded by itself (seen in
    accelerate 1.0.0 to 1.15.0).
    """
    hook = offload_hook(module)
    found = (getattr(part, "weights_map", None) for part in getattr(hook, "hooks", (hook,)))
    return next((weights for weights in found if weights is not None), None)


def forward_attribute(module: nn.Module) -> str:
    """The attribute that holds a module's forward inside accelerate's hooks.

    With hooks that is `_old_forward` (seen in accelerate 1.0.0 to 1.15.0).
    """
    return "forward" if offload_hook(module) is None else "_old_forward"


def execution_device(model: nn.Module) -> torch.device:
    """The device that a model computes on, also if accelerate offloads its weights.

    Reads `AlignDevicesHook.execution_device` (seen in accelerate 1.0.0 to 1.15.0).
    """
    found = (device for device in _devices(model) if device.type != "meta")
    return next(found, torch.device("meta"))


def _devices(model: nn.Module) -> Iterator[torch.device]:
    for parameter in model.parameters():
        yield parameter.device
    for module in model.modules():
        device = getattr(offload_hook(module), "execution_device", None)
        if device:
            yield torch.device(device)


def materialized(module: nn.Module, name: str) -> Tensor:
    """A parameter of a module, read from where accelerate offloads it.

    Args:
        module: The module.
        name: Name of one of its parameters.

    Raises:
        ValueError: If the parameter is on the meta device and offloaded nowhere.
    """
    weight: Tensor = getattr(module, name)
    if weight.device.type != "meta":
        return weight
    offloaded = offloaded_weights(module)
    if offloaded is None:
        raise ValueError("the model's weights are on the meta device, which holds no values; load them before fitting")
    return offloaded[name]
