"""Names and modules without the wrappers of other libraries."""

from __future__ import annotations

import re

from torch import nn

from bmoe_lightning.experts.wrappers.compiled import CHECKPOINTED_MODULE, COMPILED_MODULE
from bmoe_lightning.experts.wrappers.peft import BASE_LAYER, MODULES_TO_SAVE, ORIGINAL_MODULE, saved_copy

# The names under which wrappers hold the module that they wrap.
_INNER = (BASE_LAYER, ORIGINAL_MODULE, COMPILED_MODULE, CHECKPOINTED_MODULE)


def inner_name(module: nn.Module) -> str | None:
    """The name under which a wrapper holds the module that it runs; None if the module is no wrapper."""
    children = dict(module.named_children())
    if not children:
        return None
    copy = saved_copy(module)
    if copy is not None:
        return copy
    return next((name for name in _INNER if name in children), None)


def unwrapped(module: nn.Module) -> nn.Module:
    """The innermost module, below all wrappers."""
    name = inner_name(module)
    return module if name is None else unwrapped(module.get_submodule(name))


def plain_name(name: str) -> str:
    """A qualified name without the parts that wrappers add."""
    name = re.sub(rf"(^|\.){MODULES_TO_SAVE}\.[^.]+", "", name)
    return ".".join(part for part in name.split(".") if part and part not in _INNER)


def is_wrapped_name(name: str) -> bool:
    """Whether a qualified name refers to a module inside a wrapper."""
    owner, _, last = name.rpartition(".")
    return last in _INNER or owner.rpartition(".")[2] == MODULES_TO_SAVE
