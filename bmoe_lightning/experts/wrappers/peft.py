"""Adapters of PEFT: https://github.com/huggingface/peft."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

BASE_LAYER = "base_layer"
"""The child of an adapter layer that holds the adapted layer (seen in PEFT 0.18.0 to 0.21.2)."""

ORIGINAL_MODULE = "original_module"
"""The child of a `ModulesToSaveWrapper` that holds the module from before (seen in PEFT 0.18.0 to 0.21.2)."""

MODULES_TO_SAVE = "modules_to_save"
"""The child of a `ModulesToSaveWrapper` that holds the trained copies (seen in PEFT 0.18.0 to 0.21.2)."""


def saved_copy(module: nn.Module) -> str | None:
    """The name, relative to a `ModulesToSaveWrapper`, of the trained copy that it runs; None if it runs none.

    Reads `disable_adapters` and `active_adapters` (seen in PEFT 0.18.0 to 0.21.2).
    """
    copies = dict(module.named_children()).get(MODULES_TO_SAVE)
    if not isinstance(copies, nn.ModuleDict) or getattr(module, "disable_adapters", False):
        return None
    active = next((name for name in getattr(module, "active_adapters", ()) if name in copies), None)
    return None if active is None else f"{MODULES_TO_SAVE}.{active}"


def adapted_parameter(module: nn.Module) -> str | None:
    """The name of the parameter that a parameter adapter (`target_parameters`) adapts; None for other adapters.

    Reads `ParamWrapper.parameter_name` (seen in PEFT 0.18.0 to 0.21.2).
    """
    return getattr(module, "parameter_name", None)


def has_lora_variant(module: nn.Module) -> bool:
    """Whether a LoRA layer is of a variant (DoRA, say) that runs its matrices on other inputs too.

    Reads `LoraLayer.lora_variant` (seen in PEFT 0.18.0 to 0.21.2).
    """
    return bool(getattr(module, "lora_variant", None))


def parameter_deltas(wrapper: Any) -> list[Tensor]:
    """The updates of a parameter by its active adapters (`target_parameters`), one tensor each, detached.

    Reads `merged`, `disable_adapters`, `active_adapters`, `lora_A` and `get_delta_weight` of a `ParamWrapper` (seen in
    PEFT 0.18.0 to 0.21.2).
    """
    if wrapper.merged or wrapper.disable_adapters:
        return []
    active = [adapter for adapter in wrapper.active_adapters if adapter in wrapper.lora_A]
    return [wrapper.get_delta_weight(adapter).detach() for adapter in active]


def has_parameter_deltas(wrapper: Any) -> bool:
    """Whether `parameter_deltas` is not empty, without computing it."""
    active = any(adapter in wrapper.lora_A for adapter in wrapper.active_adapters)
    return active and not wrapper.merged and not wrapper.disable_adapters


def check_lora_matrix(name: str, modules: dict[str, nn.Module]) -> None:
    """Refuse a LoRA matrix that does not run as a layer of the forward pass.

    Args:
        name: Name of the layer (`...lora_A.default`, if it is a LoRA matrix).
        modules: All modules of the model by name.

    Raises:
        ValueError: If it is such a matrix; the message names it.
    """
    owner = name.rpartition(".")[0]
    wrapper = modules.get(owner.rpartition(".")[0])
    if not owner.endswith(("lora_A", "lora_B")) or wrapper is None:
        return
    if adapted_parameter(wrapper) is not None:
        raise ValueError(
            f"{name!r} adapts a parameter (target_parameters), and PEFT never runs its matrices as layers; use "
            "adapters of linear layers (target_modules) instead"
        )
    if has_lora_variant(wrapper):
        raise ValueError(
            f"{name!r} belongs to a variant of LoRA (DoRA, say) that runs its matrices on other inputs too; use plain "
            "LoRA, or put the posterior on other layers"
        )
