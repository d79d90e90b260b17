"""The curvature of texts, against gradients of their log-probabilities."""

from __future__ import annotations

import pytest
import torch
from oracles.factors import assert_dense, assert_same, dense_of
from oracles.models import tiny_qwen
from text_cases import packed, padded

from bmoe_lightning.curvature import collect_factors, collect_text_factors
from bmoe_lightning.models import sequence_log_prob


@pytest.fixture(scope="module")
def model():
    return tiny_qwen().double().eval()


def contrast(model, batch):
    """Two logits of which the first is the log-probability."""
    value = sequence_log_prob(model, batch)
    return torch.stack([value, torch.zeros_like(value)], 1), None


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_factors_are_sums_over_gradients_of_the_log_probability(model, approximation):
    """The matrix between gradients of the two logits is that of the first alone: one, whatever the probability."""
    factors = collect_text_factors(model, sequence_log_prob, [padded("left")], rank=16, approximation=approximation)
    first = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64).expand(3, 2, 2)
    assert_dense(factors, dense_of(model, contrast, padded("left"), approximation, lambda _: first), 1e-5)
    assert factors.num_examples == 3


def test_batches_and_rows_change_nothing(model):
    whole = collect_text_factors(model, sequence_log_prob, [padded("left")], rank=16)
    alone = [{name: value[i : i + 1] for name, value in padded("right").items()} for i in range(3)]
    assert_same(collect_text_factors(model, sequence_log_prob, alone, rank=16), whole, 1e-5)
    in_one_row = collect_text_factors(model, sequence_log_prob, [packed()], rank=16)
    assert_same(in_one_row, whole, 1e-5)


def test_a_single_token_is_the_empirical_fisher_of_a_classification(model):
    """Where every answer is one token, the classes are the words."""
    batch = padded("left", answers=([6], [5], [10]))
    before = {name: value[:, :-1] for name, value in batch.items()}

    def words(model, batch):
        return model(**{n: batch[n] for n in ("input_ids", "attention_mask")}).logits[:, -1], torch.tensor([6, 5, 10])

    expected = collect_factors(model, words, [before], rank=16, fisher="empirical")
    assert_same(collect_text_factors(model, sequence_log_prob, [batch], rank=16), expected, 1e-4)


def test_what_is_no_log_probability_of_texts_is_refused(model):
    with pytest.raises(ValueError, match=r"must return log-probabilities \[B\], one for each text, got \(3, 1\)"):
        collect_text_factors(model, lambda m, b: sequence_log_prob(m, b).unsqueeze(1), [padded("left")])
