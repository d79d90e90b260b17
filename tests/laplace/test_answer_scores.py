"""Scores of answers: each by its definition, from one forward pass."""

from __future__ import annotations

import weakref

import pytest
import torch
from oracles.models import tiny_qwen
from text_cases import packed, padded

from bmoe_lightning.curvature import collect_text_factors
from bmoe_lightning.laplace import AnswerScores, LaplacePosterior, score_answers, shared_terms
from bmoe_lightning.models import sequence_log_prob, sequence_logits, text_scores


@pytest.fixture(scope="module")
def model():
    return tiny_qwen().eval()


@pytest.fixture(scope="module")
def posterior(model):
    return LaplacePosterior(collect_text_factors(model, sequence_log_prob, [padded("left")], rank=3), 2.0)


@pytest.mark.parametrize("batch", [padded("right"), packed()])
def test_scores_are_those_of_model_and_posterior(model, posterior, batch, monkeypatch):
    expected, variance = text_scores(model, batch), posterior.sequence_variance(model, sequence_log_prob, batch)
    calls = []
    with monkeypatch.context() as patch:
        patch.setattr(sequence_logits, "text_scores", lambda *args: calls.append(1) or text_scores(*args))
        found = score_answers(model, batch, posterior)
    assert len(calls) == 1
    torch.testing.assert_close(found.log_prob, expected.log_prob.detach())
    torch.testing.assert_close(found.token_entropy, expected.token_entropy)
    assert torch.equal(found.num_tokens, expected.num_tokens)
    torch.testing.assert_close(found.variance, variance.variance)
    torch.testing.assert_close(found.isotropic, variance.isotropic)
    assert not any(value.requires_grad for value in vars(found).values())


def test_scores_of_a_batch_in_parts_are_those_of_the_batch(posterior, monkeypatch):
    model, batch, graphs = tiny_qwen().eval(), padded("right"), []  # of a model that no limit is known of

    def scarce(model, batch):
        graphs[:] = [graph for graph in graphs if graph() is not None]
        assert not graphs
        scores = text_scores(model, batch)
        graphs.append(weakref.ref(scores))
        return scores

    expected = score_answers(model, batch, posterior)
    count, covariance = len(batch["input_ids"]), shared_terms.batch_terms

    def without_memory(model, posteriors, class_logits, batch, **options):
        terms = covariance(model, posteriors, class_logits, batch, **options)
        if len(batch["input_ids"]) > count // 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return terms

    monkeypatch.setattr(sequence_logits, "text_scores", scarce)
    monkeypatch.setattr(shared_terms, "batch_terms", without_memory)
    found = score_answers(model, batch, posterior)
    for name, value in vars(expected).items():
        torch.testing.assert_close(getattr(found, name), value, rtol=1e-4, atol=1e-6)


def test_every_score_is_higher_where_the_answer_is_less_certain():
    found = AnswerScores(
        log_prob=torch.tensor([-8.0, -2.0]),
        num_tokens=torch.tensor([4, 2]),
        token_entropy=torch.tensor([0.5, 0.25]),
        variance=torch.tensor([9.0, 4.0]),
        isotropic=torch.tensor([12.0, 0.0]),
    )
    assert {name: value.tolist() for name, value in found.uncertainties().items()} == {
        "sequence_probability": [8.0, 2.0],
        "length_normalised": [2.0, 1.0],
        "token_entropy": [0.5, 0.25],
        "posterior_variance": [9.0, 4.0],
        "isotropic_variance": [12.0, 0.0],
        "variance_ratio": [0.75, 0.0],
        "lower_bound": [11.0, 4.0],
    }
