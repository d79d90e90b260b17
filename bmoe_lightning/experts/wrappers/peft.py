"""Adapters of PEFT: https://github.com/huggingface/peft."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from bmoe_lightning.experts.wrappers.accelerate import materialized

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


def lora_matrices(model: nn.Module, matrices: str = "AB") -> list[str]:
    """The names of the LoRA matrices that run in a forward pass: of active adapters that are not merged.

    Reads `merged`, `disable_adapters`, `active_adapters`, `lora_A`, `lora_B` and `lora_embedding_A` of a `LoraLayer`
    (seen in PEFT 0.18.0 to 0.21.2).

    Args:
        model: Any module.
        matrices: Which of them, `A`, `B` or both.

    Raises:
        ValueError: If LoRA adapts an embedding, whose matrices are no layers; the message names it.
    """
    found = []
    for name, layer in _active_lora_layers(model):
        for adapter in layer.active_adapters:
            if adapter in layer.lora_embedding_A:
                raise ValueError(
                    f"LoRA adapts the embedding {name!r}, whose matrices do not run as layers; adapt linear layers only"
                )
            parts = [(f"lora_{matrix}", getattr(layer, f"lora_{matrix}")) for matrix in matrices]
            found += [f"{name}.{part}.{adapter}" for part, owner in parts if adapter in owner]
    return found


def lora_dropouts(model: nn.Module) -> dict[str, float]:
    """The dropout probability in front of each active LoRA matrix A, by the name of its layer; 0 for none.

    Adapters of parameters (`target_parameters`), which have no dropout, are left out.

    Reads `lora_dropout` of a `LoraLayer` (seen in PEFT 0.18.0 to 0.21.2).
    """
    return {
        name: float(getattr(layer.lora_dropout[adapter], "p", 0.0))
        for name, layer in _active_lora_layers(model)
        for adapter in layer.active_adapters
        if adapter in layer.lora_dropout and adapted_parameter(layer) is None
    }


def _active_lora_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """Layers that LoRA adapts in a forward pass, by name, in order."""
    layers: list[tuple[str, Any]] = [
        (name, module) for name, module in model.named_modules() if hasattr(module, "lora_A") and is_adapter(module)
    ]
    return [(name, layer) for name, layer in layers if not layer.merged and not layer.disable_adapters]


def is_adapter(module: nn.Module) -> bool:
    """Whether a module is an adapter around another one, whatever its kind.

    Reads `merge` and `merged_adapters` of a `BaseTunerLayer` (seen in PEFT 0.18.0 to 0.21.2).
    """
    return (
        BASE_LAYER in dict(module.named_children()) and hasattr(module, "merge") and hasattr(module, "merged_adapters")
    )


@torch.no_grad()
def merged_copy(adapter: Any) -> nn.Module:
    """A copy of an adapted module with its active adapters merged into its weights, in at least float32.

    The arithmetic is PEFT's own, without the rounding to the module's dtype; the adapter itself is unchanged. Disabled
    adapters are left out.

    Calls `unload_and_optionally_merge_module`, where there is one, or `merge` (seen in PEFT 0.18.0 to 0.21.2).
    """
    copied: Any = _copied(adapter, base=False)
    if adapter.disable_adapters:
        return copied.get_base_layer()
    if hasattr(copied, "unload_and_optionally_merge_module"):
        return copied.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
    copied.merge()
    return copied.get_base_layer()


def _copied(module: nn.Module, *, base: bool) -> nn.Module:
    """A copy with tensors of its own, those of the adapted module in at least float32; all else is shared."""
    copied: nn.Module = module.__class__.__new__(module.__class__)
    vars(copied).update(
        {
            name: copy.copy(value) if isinstance(value, (dict, list, set)) else value
            for name, value in vars(module).items()
        }
    )
    base = base and BASE_LAYER not in module._modules
    for name, parameter in module._parameters.items():
        if parameter is not None:
            value = materialized(module, name).detach().clone()
            if base and value.is_floating_point():
                value = value.to(torch.promote_types(value.dtype, torch.float32))
            copied._parameters[name] = nn.Parameter(value, requires_grad=False)
    for name, buffer in module._buffers.items():
        copied._buffers[name] = None if buffer is None else buffer.clone()
    for name, child in module._modules.items():
        copied._modules[name] = None if child is None else _copied(child, base=base or name == BASE_LAYER)
    return copied
