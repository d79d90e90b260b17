"""Buffers that keep their precision when a model is cast to half precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def unrounded_buffers(model: nn.Module) -> Iterator[None]:
    """Undo roundings of a model's non-persistent buffers within a context.

    These are not in the files of a model but computed, in float32, when it is created: the frequencies of rotary
    position embeddings, for one. `from_pretrained(dtype=torch.bfloat16)` leaves them so. A cast of the whole model
    rounds them, which turns the angles at position 256 by tenths of a radian (by .3 for 128 dimensions and base 10^6).

    Args:
        model: Model that may be cast, and moved to another device, within the context.
    """
    before = [(module, name, buffer) for module, name, buffer in _computed_buffers(model)]
    yield
    for module, name, buffer in before:
        now = module._buffers.get(name)
        if now is not None and now.is_floating_point() and torch.finfo(now.dtype).bits < torch.finfo(buffer.dtype).bits:
            module._buffers[name] = buffer.to(now.device)


def _computed_buffers(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for module in model.modules():
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers.get(name)
            if buffer is not None and buffer.is_floating_point():
                yield module, name, buffer
