"""Averages of routing scores against quadrature, and the logits that stand for them."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from bmoe_lightning.routers import sample_noise
from bmoe_lightning.routers.scores import check_score, log_scores, mean_scores, sample_chunks

SCORES = pytest.mark.parametrize("score", ["softmax", "sigmoid"])
MEAN = torch.tensor([0.8, -0.3, 0.1], dtype=torch.float64)


def scores_of(logits, score):
    return logits.softmax(-1) if score == "softmax" else logits.sigmoid()


def samples(tokens, num_experts, num_samples, **options):
    noise = sample_noise((tokens, num_experts), seed=3, router=0, samples=range(num_samples), **options)
    return noise.double()


def quadrature(mean, scale, score, nodes=24):
    """E[score(mean + scale z)] for three experts, by a product of Gauss-Hermite rules."""
    at, weight = np.polynomial.hermite_e.hermegauss(nodes)
    at = torch.tensor(list(itertools.product(at, repeat=3)))
    weight = torch.tensor(list(itertools.product(weight / math.sqrt(2 * math.pi), repeat=3))).prod(1)
    return weight @ scores_of(mean + scale * at, score)


@SCORES
def test_the_mean_of_dense_samples_in_any_chunks(score):
    logits = MEAN + samples(5, 3, 11)
    expected = scores_of(logits, score).mean(0)
    for size in (1, 4, 11):
        found = mean_scores(logits.split(size), score)
        torch.testing.assert_close(found.log_mean.exp(), expected, rtol=1e-12, atol=0)
        back = found.logits(MEAN.expand(5, 3))
        torch.testing.assert_close(scores_of(back, score), expected, rtol=1e-12, atol=0)


@SCORES
def test_quadrature_is_approached_as_one_over_the_root_of_the_number_of_samples(score):
    exact = quadrature(MEAN, 1.0, score)
    torch.testing.assert_close(exact, quadrature(MEAN, 1.0, score, nodes=32), rtol=1e-7, atol=0)
    noise = samples(200, 3, 512)
    counts = [8, 32, 128, 512]
    errors = [
        (mean_scores([MEAN + noise[:count]], score).log_mean.exp() - exact).square().mean().sqrt().item()
        for count in counts
    ]
    slope = np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(-0.5, abs=0.1)


def test_mirrored_samples_have_less_variance():
    exact = quadrature(MEAN, 1.0, "softmax")
    error = {}
    for antithetic in (False, True):
        logits = MEAN + samples(2000, 3, 8, antithetic=antithetic)
        error[antithetic] = (mean_scores([logits], "softmax").log_mean.exp() - exact).square().mean().item()
    assert error[True] <= 0.6 * error[False]


@SCORES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_far_logits_are_finite_and_stay_in_order(score, dtype):
    logits = torch.tensor([[80.0, 0.0, -79.0, -80.0]], dtype=dtype)
    found = mean_scores([logits.expand(7, 1, 4)], score)
    assert found.log_mean.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    back = found.logits(logits)
    assert back.dtype == dtype
    torch.testing.assert_close(back, logits, rtol=1e-6, atol=1e-6)
    assert torch.isfinite(found.log_mean).all()
    mixed = mean_scores([torch.cat([logits, -logits]).unsqueeze(1)], score).logits(logits)
    assert torch.isfinite(mixed).all()


@SCORES
def test_without_noise_the_logits_come_back(score):
    logits = torch.randn(6, 9, dtype=torch.float64)
    back = mean_scores([logits.expand(35, 6, 9)], score).logits(logits)
    torch.testing.assert_close(back, logits, rtol=0, atol=1e-12)
    torch.testing.assert_close(log_scores(logits, score).exp(), scores_of(logits, score))


def test_exchangeable_noise_flattens_the_scores_and_leaves_their_order():
    logits = 0.3 * torch.randn(20, 4, dtype=torch.float64)
    permutations = torch.tensor(list(itertools.permutations(range(4))))
    noise = samples(1, 4, 10)[:, :, permutations].flatten(0, 2).unsqueeze(1)  # exchangeable to the last digit
    found = mean_scores([logits + noise], "softmax").log_mean
    assert torch.equal(found.argsort(), logits.argsort())
    assert (found.exp().max(-1).values < logits.softmax(-1).max(-1).values).all()


def test_the_logsumexp_of_the_mean_logits_stays():
    logits = torch.randn(6, 9, dtype=torch.float64) + 4
    back = mean_scores([logits + samples(6, 9, 35)], "softmax").logits(logits)
    torch.testing.assert_close(back.logsumexp(-1), logits.logsumexp(-1))


@SCORES
def test_gradients(score):
    logits = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda at: mean_scores(at.split(3), score).logits(at.mean(0)), logits)


def test_refusals():
    with pytest.raises(ValueError, match="no sample of the logits"):
        mean_scores([torch.empty(0, 2, 3)], "softmax")
    with pytest.raises(ValueError, match="score is 'other'; average predictions"):
        mean_scores([torch.zeros(1, 2, 3)], "other")
    with pytest.raises(ValueError, match="probe_routers"):
        check_score(None)


def test_chunks_of_samples():
    assert [list(chunk) for chunk in sample_chunks(5, 10, limit=20)] == [[0, 1], [2, 3], [4]]
    assert [list(chunk) for chunk in sample_chunks(2, 100, limit=20)] == [[0], [1]]
