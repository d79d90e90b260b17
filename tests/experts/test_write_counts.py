"""In-place writes are counted, and their counts are of this model's tensors."""

from __future__ import annotations

import torch
from torch import nn

from bmoe_lightning.experts.write_counts import weights_state, write_count


def test_write_count():
    tensor = torch.zeros(3)
    before = write_count(tensor)
    tensor.add_(1)
    tensor[0] = 2
    assert write_count(tensor) == before + 2
    with torch.inference_mode():
        assert write_count(torch.zeros(3)) == 0


def test_weights_state():
    model = nn.Linear(2, 2)
    before = weights_state(model)
    model(torch.zeros(1, 2)).sum().backward()
    assert weights_state(model) == before
    with torch.no_grad():
        model.bias.add_(0)
    assert weights_state(model) != before
    changed = weights_state(model)
    model.weight = nn.Parameter(model.weight.detach().clone())
    assert weights_state(model) != changed


def test_quantised_weights_are_left_out():
    model = nn.Linear(2, 2)
    model.packed = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    assert len(weights_state(model)) == 2
