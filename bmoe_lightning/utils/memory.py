"""Whether an error says that there is not enough memory."""

from __future__ import annotations

import torch

_WORDS = ("can't allocate memory", "out of memory")
"""In the messages of the CPU's allocator, and of devices whose allocator raises a plain `RuntimeError`, such as MPS."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is not enough memory, on any device.

    `torch.OutOfMemoryError` is raised by CUDA, XPU and others; the CPU's allocator raises a `RuntimeError`, and
    Python's a `MemoryError`.

    Args:
        error: Any error.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)
