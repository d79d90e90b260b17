"""Log-probabilities of whole texts, against a loop over texts and tokens."""

from __future__ import annotations

import pytest
import torch
from oracles.models import tiny_qwen
from text_cases import ANSWERS, PROMPTS, packed, padded

from bmoe_lightning.models import sequence_log_prob, text_scores


def by_hand(model):
    sums, entropies = [], []
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
        places = range(len(prompt), len(prompt + answer))
        sums.append(sum(logits[place - 1, (prompt + answer)[place]] for place in places))
        entropies.append(sum(-(logits[p - 1].exp() * logits[p - 1]).sum() for p in places) / len(answer))
    return torch.stack(sums), torch.stack(entropies)


@pytest.fixture(scope="module")
def model():
    return tiny_qwen().double()


@pytest.mark.parametrize("batch", [padded("left"), padded("right"), packed(), packed((0, 1, 2), 0)])
def test_scores_are_those_of_each_text_alone(model, batch):
    found = text_scores(model, batch)
    sums, entropies = by_hand(model)
    torch.testing.assert_close(found.log_prob.double(), sums, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.token_entropy.double(), entropies, rtol=1e-5, atol=1e-5)
    assert found.num_tokens.tolist() == [2, 4, 1]
    assert found.log_prob.requires_grad
    assert not found.token_entropy.requires_grad
    assert torch.equal(sequence_log_prob(model, batch), found.log_prob)


def test_padding_within_an_answer_mask_does_not_count(model):
    batch = padded("right")
    batch["answer_mask"] = torch.where(batch["attention_mask"] == 0, 1, batch["answer_mask"])
    torch.testing.assert_close(sequence_log_prob(model, batch), sequence_log_prob(model, padded("right")))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sliding_window": 3, "layer_types": ["sliding_attention"] * 2, "use_sliding_window": True}, "a window of 3"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layers of the kind linear_attention"),
    ],
)
def test_texts_share_no_row_of_a_model_that_takes_no_mask_of_pairs(options, said):
    model = tiny_qwen().double()
    for name, value in options.items():
        setattr(model.config, name, value)
    with pytest.raises(ValueError, match=f"has {said}.*, so texts of up to 6 tokens cannot share a row"):
        sequence_log_prob(model, packed())
    if "sliding_window" in options:
        model.config.sliding_window = 6
        assert sequence_log_prob(model, packed()).shape == (3,)


def changed(batch, **values):
    return {**batch, **values}


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        (changed(padded("left"), answer_mask=torch.zeros(3, 6)), "text 0 of the batch has no answer"),
        (changed(padded("left"), answer_mask=torch.ones(3, 6)), "text 0 of the batch begins with its answer"),
        (
            changed(padded("left"), answer_mask=torch.ones(3, 5)),
            r"one shape \[R, T\], got \(3, 6\), \(3, 6\), \(3, 5\)",
        ),
        (changed(padded("left"), attention_mask=torch.zeros(3, 6)), "there is no text"),
        (changed(packed(), attention_mask=packed()["attention_mask"] * 0), "there is no text"),
        (changed(packed(), text_index=torch.full_like(packed()["text_index"], -1)), "must be 0 or more"),
        (changed(packed(), text_index=packed()["text_index"].clamp(min=0) * 0), "tokens in several places"),
        (changed(packed(), text_index=packed()["text_index"] * 2), "text 1 of the batch has no token"),
    ],
)
def test_malformed_batches_are_refused(model, batch, said):
    with pytest.raises(ValueError, match=said):
        text_scores(model, batch)
