"""Tensors on several devices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def answers_at_once(device: torch.device) -> bool:
    """Whether values on a device can be read without waiting for it."""
    return device.type == "cpu"


def to_cpu(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copy tensors to the CPU with a single synchronisation for each device.

    Args:
        tensors: Tensors of one dtype, equal in all dimensions but the first.
    """
    found: dict[int, Tensor] = {}
    for device in dict.fromkeys(tensor.device for tensor in tensors):
        there = [index for index, tensor in enumerate(tensors) if tensor.device == device]
        joined = torch.cat([tensors[index] for index in there]).cpu()
        found |= dict(zip(there, joined.split([len(tensors[index]) for index in there]), strict=True))
    return [found[index] for index in range(len(tensors))]
