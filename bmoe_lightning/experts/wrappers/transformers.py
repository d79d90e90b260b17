"""Private attributes of transformers: parallel plans, the experts interface, recorded routers, gradient checkpointing.

Transformers takes longer to import than torch, and nothing here needs it for a model that is none of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from bmoe_lightning.experts.wrappers.accelerate import forward_attribute

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.modeling_layers import GradientCheckpointingLayer


def imported_class(module: str, name: str) -> Any:
    """A class of transformers for `isinstance`; an empty tuple, which has no instances, until its module is imported.

    Args:
        module: The module that defines the class, such as `transformers.modeling_utils`.
        name: Name of the class.
    """
    return getattr(sys.modules.get(module), name, ())


def outermost_pretrained(model: nn.Module) -> list[PreTrainedModel]:
    """The outermost `PreTrainedModel`s in a module."""
    if isinstance(model, imported_class("transformers.modeling_utils", "PreTrainedModel")):
        return [model]
    return [owner for child in model.children() for owner in outermost_pretrained(child)]


def has_parallel_plan(module: nn.Module) -> bool:
    """Whether transformers runs a module with tensor or expert parallelism.

    Reads `_is_hooked` (seen in transformers 5.16.0 to 5.23.0) and `_is_expert_parallel` (in 5.23.0, not 5.16.0).
    """
    return bool(getattr(module, "_is_hooked", False) or getattr(module, "_is_expert_parallel", False))


def experts_implementation_attribute(config: Any) -> str:
    """The attribute of a configuration that names the experts implementation.

    That is `_experts_implementation_internal` (seen in transformers 5.16.0 to 5.23.0), since setting the property
    `_experts_implementation` would set it in sub-configurations too; other configurations have the plain attribute.
    """
    internal = "_experts_implementation_internal"
    return internal if hasattr(config, internal) else "_experts_implementation"


def can_checkpoint_with_cache(layer: GradientCheckpointingLayer) -> bool:
    """Whether a checkpointed layer takes a cache of keys and values.

    Reads `GradientCheckpointingLayer._can_checkpoint_with_cache` (seen in transformers 5.16.0 to 5.23.0).
    """
    return layer._can_checkpoint_with_cache


def checkpoint_function(layer: nn.Module) -> Callable[..., Any]:
    """The function with which a layer checkpoints its forward; torch's, unless transformers set another.

    Reads `_gradient_checkpointing_func` (seen in transformers 5.16.0 to 5.23.0).
    """
    return getattr(layer, "_gradient_checkpointing_func", checkpoint)


def recorded_router_classes(model: nn.Module) -> tuple[type[nn.Module], ...]:
    """The classes of modules whose output holds router logits, as the model classes of transformers name them.

    Reads `_can_record_outputs` and `OutputRecorder.target_class` (seen in transformers 5.16.0 to 5.23.0).
    """
    found: dict[type[nn.Module], None] = {}
    for module in model.modules():
        recorded = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits", ())
        for entry in recorded if isinstance(recorded, (list, tuple)) else (recorded,):
            kind = getattr(entry, "target_class", entry)
            if isinstance(kind, type):
                found[kind] = None
    return tuple(found)


def is_kernel(module: nn.Module) -> bool:
    """Whether the forward of a module was replaced by a kernel from the hub.

    Reads `kernel_layer_name`, which `use_kernel_forward_from_hub` sets, and the forward that `kernelize` puts on the
    instance (seen in kernels 0.17.2).
    """
    if not hasattr(type(module), "kernel_layer_name"):
        return False
    own = vars(module).get(forward_attribute(module))
    return own is not None and getattr(own, "__func__", None) is not type(module).forward
