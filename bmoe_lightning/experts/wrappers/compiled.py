"""torch.compile, and torch's wrapper of checkpointed modules."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

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


class _EagerCode:
    """The number of contexts that run code eagerly, in all threads, and the stance of the first."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.count = 0
        self.stance = ExitStack()


_eager = _EagerCode()


@contextmanager
def eager_code() -> Iterator[None]:
    """Run code eagerly that torch.compile compiled; the compiled graphs stay valid for later.

    The stance of the compiler is one of the process, so other threads run eagerly meanwhile too.
    """
    with _eager.lock:
        if _eager.count == 0:
            _eager.stance.enter_context(torch.compiler.set_stance("force_eager"))
        _eager.count += 1
    try:
        yield
    finally:
        with _eager.lock:
            _eager.count -= 1
            if _eager.count == 0:
                _eager.stance.close()
