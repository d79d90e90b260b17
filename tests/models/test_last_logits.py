"""The logits at the end of a prompt, wherever its padding is."""

from __future__ import annotations

import pytest
import torch
from oracles.models import tiny_qwen

from bmoe_lightning.models.last_logits import last_logits


@pytest.mark.parametrize("side", ["left", "right", "both", "none"])
def test_padding_does_not_matter(side):
    model = tiny_qwen()
    ids = torch.tensor([5, 3, 8, 2])
    expected = model(input_ids=ids.unsqueeze(0)).logits[0, -1]
    left, right = {"left": (3, 0), "right": (0, 3), "both": (1, 2), "none": (0, 0)}[side]
    padded = torch.nn.functional.pad(ids, (left, right)).repeat(2, 1)
    mask = torch.nn.functional.pad(torch.ones_like(ids), (left, right)).repeat(2, 1)
    found = last_logits(model, padded, mask)
    assert found.shape == (2, len(expected))
    torch.testing.assert_close(found, expected.expand(2, -1), rtol=1e-5, atol=1e-6)
