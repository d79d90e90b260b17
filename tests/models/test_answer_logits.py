"""Logits of answer tokens: from the last token that is no padding, in at least float32, without absent choices."""

from __future__ import annotations

import pytest
import torch
from oracles.models import tiny_qwen

from bmoe_lightning.models.answer_logits import answer_logits, checked_answer_ids

IDS = torch.tensor([2, 7, 5])


@pytest.fixture(scope="module")
def model():
    return tiny_qwen()


def prompts(side):
    """Prompts of 3, 6 and 4 tokens, padded on one side."""
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(1, 20, (length,), generator=generator) for length in (3, 6, 4)]
    padding = [torch.zeros(6 - len(row), dtype=torch.int64) for row in rows]
    pairs = zip(padding, rows, strict=True)
    ids = torch.stack([torch.cat(pair if side == "left" else pair[::-1]) for pair in pairs])
    return rows, {"input_ids": ids, "attention_mask": (ids > 0).long()}


@pytest.mark.parametrize("side", ["left", "right"])
def test_are_those_of_each_prompt_alone(model, side):
    rows, batch = prompts(side)
    found = answer_logits(model, batch, IDS)
    for row, logits in zip(rows, found, strict=True):
        expected = model(input_ids=row.unsqueeze(0)).logits[0, -1, IDS]
        torch.testing.assert_close(logits, expected.to(logits.dtype), rtol=1e-6, atol=1e-7)
    assert found.requires_grad


def test_choices_of_each_question(model):
    batch, ids = prompts("left")[1], torch.tensor([[2, 7, 5], [1, 2, 3], [9, 4, 9]])
    found = answer_logits(model, batch, ids)
    for row, answers in enumerate(ids):
        assert torch.equal(found[row], answer_logits(model, batch, answers)[row])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_are_at_least_float32(dtype):
    """The softmax of bfloat16 logits would have two digits."""
    found = answer_logits(tiny_qwen(dtype=dtype), prompts("left")[1], IDS)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_absent_choices(model):
    batch = prompts("left")[1]
    whole = answer_logits(model, batch, IDS)
    present = torch.tensor([[True, True, False], [True, True, True], [True, False, True]])
    found = answer_logits(model, {**batch, "choice_mask": present}, IDS)
    assert torch.equal(found == -torch.inf, ~present)
    torch.testing.assert_close(found[present], whole[present])


@pytest.mark.parametrize("choices", [2, 4])
def test_another_number_of_choices_than_answer_tokens(model, choices):
    batch = {**prompts("left")[1], "choice_mask": torch.ones(3, choices, dtype=torch.bool)}
    with pytest.raises(
        ValueError, match=rf"shape \(3, {choices}\), but there are 3 answer tokens for 3 questions; pass"
    ):
        answer_logits(model, batch, IDS)


@pytest.mark.parametrize("ids", [[3], [], [3, 3], [3, -1], [3, 5, 3]])
def test_answer_tokens_that_cannot_be(ids):
    with pytest.raises(ValueError, match="answer_token_ids must be two or more different token ids"):
        checked_answer_ids(ids)


def test_answer_tokens_become_numbers():
    assert checked_answer_ids(IDS) == [2, 7, 5]
    assert all(type(token) is int for token in checked_answer_ids(IDS))
