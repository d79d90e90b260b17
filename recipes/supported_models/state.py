"""The state of a model that a curvature pass must restore."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def state_of(model: nn.Module) -> dict[str, Any]:
    """The state of a model, and of the global random generator, by name."""
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    configs = [getattr(module, "config", None) for module in modules.values()]
    return {
        "experts implementation": [getattr(config, "_experts_implementation", None) for config in configs],
        "training modes": {name: module.training for name, module in modules.items()},
        "requires_grad": {name: parameter.requires_grad for name, parameter in parameters.items()},
        "gradients": {name for name, parameter in parameters.items() if parameter.grad is not None},
        "weights": {name: (parameter.data_ptr(), parameter._version) for name, parameter in parameters.items()},
        "attributes": {name: set(vars(module)) for name, module in modules.items()},
        "hooks": {
            name: len(module._forward_hooks) + len(module._forward_pre_hooks) for name, module in modules.items()
        },
        "random state": torch.get_rng_state().tolist(),
    }


def differences(before: dict[str, Any], after: dict[str, Any]) -> tuple[str, ...]:
    """The names of what differs."""
    return tuple(name for name, value in before.items() if value != after[name])
