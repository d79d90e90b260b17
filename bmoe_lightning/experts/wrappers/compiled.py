"""torch.compile, and torch's wrapper of checkpointed modules."""

from __future__ import annotations

import torch
from torch import nn

COMPILED_MODULE = "_orig_mod"
"""The child of a compiled module (`torch.compile(module)`) that holds the module (seen in torch 2.13)."""

CHECKPOINTED_MODULE = "_checkpoint_wrapped_module"
"""The child of torch.distributed's `checkpoint_wrapper` that holds the module (seen in torch 2.13)."""


def is_compiled(model: nn.Module) -> bool:
    """Whether a module in a model is compiled, by `torch.compile(module)` or in place by `module.compile()`.

    Reads `torch._dynamo.OptimizedModule` and `Module._compiled_call_impl` (seen in torch 2.13).
    """
    return any(
        isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl is not None
        for module in model.modules()
    )
