"""The logits at the end of a prompt, wherever its padding is."""

from __future__ import annotations

import types

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


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_output_embedding_gets_contiguous_states_at_no_other_positions(side):
    """A frozen weight is copied for each row of a slice that is not contiguous."""
    model, seen = tiny_qwen(), []
    model.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    ids = torch.arange(2, 14).view(3, 4)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])
    if side == "right":
        mask = mask.flip(1)
    found = last_logits(model, ids, mask)
    assert seen[0].shape[:2] == (3, {"left": 1, "right": 2}[side])
    assert seen[0].is_contiguous()
    whole = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    last = [3, 3, 3] if side == "left" else [3, 3, 2]
    torch.testing.assert_close(found, whole[torch.arange(3), torch.tensor(last)], rtol=1e-12, atol=1e-12)


class _Signature(torch.nn.Module):
    """A model whose forward has another signature."""

    def __init__(self, forward):
        super().__init__()
        self.forward = forward


def test_a_model_that_takes_a_number_of_positions_only_returns_all():
    def forward(input_ids, attention_mask, logits_to_keep: int = 0):
        logits = input_ids.unsqueeze(2) * torch.ones(2)
        return types.SimpleNamespace(logits=logits[:, -logits_to_keep:] if logits_to_keep else logits)

    ids = torch.tensor([[5, 6, 7], [8, 9, 0]])
    found = last_logits(_Signature(forward), ids, torch.tensor([[1, 1, 1], [1, 1, 0]]))
    assert found[:, 0].tolist() == [7, 9]


def test_other_positions_than_asked_for_are_refused():
    def forward(input_ids, attention_mask, logits_to_keep: int | torch.Tensor = 0):
        kept = slice(-logits_to_keep, None)  # a number of positions, whatever the annotation says
        return types.SimpleNamespace(logits=input_ids[:, kept].unsqueeze(2))

    with pytest.raises(ValueError, match="logits at 2 positions instead of 1"):
        last_logits(_Signature(forward), torch.tensor([[5, 6, 7]]), torch.ones(1, 3))
