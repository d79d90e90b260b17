"""Variance of log-probabilities of texts, against the gradient of each text in all weights of the experts."""

from __future__ import annotations

import pytest
import torch
from oracles.dense import dense_logit_covariance, low_rank_blocks, weight_jacobians
from oracles.models import answer_logits, tiny_qwen, toy_batch
from text_cases import packed, padded

from bmoe_lightning.curvature import collect_factors
from bmoe_lightning.experts import down_proj_parameters, find_expert_layers
from bmoe_lightning.laplace import LaplacePosterior
from bmoe_lightning.models import sequence_log_prob


@pytest.fixture(scope="module")
def model():
    return tiny_qwen().double().eval()


@pytest.fixture(scope="module")
def posterior(model):
    factors = collect_factors(model, answer_logits, [toy_batch(seed=3)], rank=3)
    precision = torch.linspace(0.3, 20.0, len(factors.layers), dtype=torch.float64)
    return LaplacePosterior(factors, precision)


def dense(model, posterior, batch):
    """Variance and squared gradient norm of each text."""
    parameters = [
        parameter for layer in find_expert_layers(model) for parameter in down_proj_parameters(model, layer).values()
    ]
    for parameter in parameters:
        parameter.requires_grad_(True)
    jacobians = weight_jacobians(sequence_log_prob(model, batch).unsqueeze(1), parameters)
    blocks = [low_rank_blocks(layer) for layer in posterior.factors.layers]
    variance = dense_logit_covariance(jacobians, blocks, posterior.prior_precision.tolist())[:, 0, 0]
    return variance, sum(jacobian.double().square().sum((1, 2, 3)) for jacobian in jacobians)


@pytest.mark.parametrize("batch", [padded("left"), padded("right"), packed()])
def test_variance_is_that_of_the_dense_posterior(model, posterior, batch):
    variance, norm = dense(model, posterior, batch)
    found = posterior.sequence_variance(model, sequence_log_prob, batch)
    torch.testing.assert_close(found.variance, variance, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(found.isotropic, norm, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(found.log_prob, sequence_log_prob(model, batch).detach())
    torch.testing.assert_close(found.standard_deviation.square(), found.variance)
    assert not found.log_prob.requires_grad


def test_batches_and_rows_change_nothing(model, posterior):
    found = [
        posterior.sequence_variance(model, sequence_log_prob, b) for b in (padded("left"), padded("right"), packed())
    ]
    alone = [
        posterior.sequence_variance(model, sequence_log_prob, {n: v[i : i + 1] for n, v in padded("left").items()})
        for i in range(3)
    ]
    expected = torch.cat([of_text.variance for of_text in alone])
    for of_all in found:
        torch.testing.assert_close(of_all.variance, expected, rtol=1e-4, atol=0)


def test_one_backward_pass_serves_all_texts(model, posterior, monkeypatch):
    posterior.sequence_variance(model, sequence_log_prob, padded("left"))  # looks who depends on whom, once
    calls, grad = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **options: calls.append(1) or grad(*args, **options))
    alone = {name: value[:1] for name, value in padded("left").items()}
    posterior.sequence_variance(model, sequence_log_prob, alone)
    assert len(calls) == 1


def test_improbable_texts_have_a_variance(model, posterior):
    """Their log-probability is further below zero than an absent class is below the largest logit."""

    def improbable(model, batch):
        return 1000 * sequence_log_prob(model, batch)

    found = posterior.sequence_variance(model, improbable, padded("left"))
    plain = posterior.sequence_variance(model, sequence_log_prob, padded("left"))
    assert bool((found.log_prob < -5000).all())
    torch.testing.assert_close(found.variance, 1e6 * plain.variance, rtol=1e-4, atol=0)


def test_what_is_no_log_probability_of_texts_is_refused(model, posterior):
    with pytest.raises(ValueError, match=r"must return log-probabilities \[B\], one for each text, got \(3, 1\)"):
        posterior.sequence_variance(model, lambda m, b: sequence_log_prob(m, b).unsqueeze(1), padded("left"))
