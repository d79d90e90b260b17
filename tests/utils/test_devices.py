"""Tensors come to the CPU in their order."""

from __future__ import annotations

import torch
from oracles.waits import Waits

from bmoe_lightning.utils.devices import to_cpu


def test_order_and_values():
    tensors = [torch.arange(float(n)) for n in (3, 0, 2)]
    found = to_cpu(tensors)
    assert all(torch.equal(one, other) for one, other in zip(found, tensors, strict=True))
    assert to_cpu([]) == []


def test_no_wait_for_each_tensor():
    with Waits() as waits:
        to_cpu([torch.ones(2)] * 10)
    assert waits.count == 0
