"""Closed-form covariances of router logits against samples of the weights, and their limits."""

from __future__ import annotations

import pytest
import torch

from bmoe_lightning.routers import sample_noise
from bmoe_lightning.routers.weight_noise import DropoutLogits, SwagWeights, dropout_multipliers, ensemble_logits

N, D, TOKENS, SAMPLES = 4, 6, 2, 100_000


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def noise(width, kind="normal"):
    return sample_noise((SAMPLES, width), seed=1, router=0, samples=[0], kind=kind)[0].double()


def assert_covariance(distribution, samples, within=0.03):
    """The empirical covariance of `[S, tokens, N]` within 3 % of the closed form, token by token."""
    covariance = distribution.covariance()
    for token in range(TOKENS):
        error = torch.linalg.matrix_norm(samples[:, token].T.cov() - covariance[token])
        assert error < within * torch.linalg.matrix_norm(covariance[token])
        spread = covariance[token].trace().sqrt()
        assert (samples[:, token].mean(0) - distribution.mean[token]).norm() < 0.02 * spread


def assert_traces(distribution):
    covariance = distribution.covariance()
    n = covariance.shape[-1]
    centring = torch.eye(n, dtype=torch.float64) - 1 / n
    for found, matrix in [
        (distribution.trace(), covariance),
        (distribution.centred_trace(), centring @ covariance @ centring),
    ]:
        torch.testing.assert_close(found, matrix.diagonal(dim1=1, dim2=2).sum(1), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("rate", [0.05, 0.4])
def test_dropout(rate):
    weight, inputs, bias = randn(N, D), randn(TOKENS, D), randn(N)
    distribution = DropoutLogits(inputs @ weight.T + bias, inputs, weight, rate)
    multipliers = dropout_multipliers(noise(D, "uniform"), rate)
    assert set(multipliers.unique().tolist()) == {0.0, 1 / (1 - rate)}
    assert_covariance(distribution, (multipliers.unsqueeze(1) * inputs) @ weight.T + bias)
    assert_traces(distribution)


def test_dropout_of_rate_zero():
    weight, inputs = randn(N, D), randn(TOKENS, D)
    distribution = DropoutLogits(inputs @ weight.T, inputs, weight, 0.0)
    assert (distribution.covariance() == 0).all()
    assert (distribution.centred_trace() == 0).all()
    assert (dropout_multipliers(torch.rand(50), 0.0) == 1).all()


@pytest.mark.parametrize("rate", [1.0, -0.1])
def test_rates_that_are_no_probability(rate):
    with pytest.raises(ValueError, match="a probability below 1, got"):
        dropout_multipliers(torch.rand(3), rate)
    with pytest.raises(ValueError, match="a probability below 1, got"):
        DropoutLogits(torch.zeros(1, N), torch.zeros(1, D), torch.zeros(N, D), rate)


def test_swag():
    swag = SwagWeights(randn(N, D), randn(N, D).square(), randn(3, N, D))
    inputs = randn(TOKENS, D)
    assert swag.noise_width == N * D + 3
    samples = torch.einsum("snd,td->stn", swag.sample(noise(swag.noise_width)), inputs)
    distribution = swag.logits(inputs)
    assert_covariance(distribution, samples)
    assert_traces(distribution)


def test_swag_without_variance_is_the_mean():
    swag = SwagWeights(randn(N, D), 0 * randn(N, D), 0 * randn(2, N, D))
    assert torch.equal(swag.sample(torch.randn(5, swag.noise_width)), swag.mean.expand(5, N, D))
    distribution = swag.logits(randn(TOKENS, D))
    assert (distribution.covariance() == 0).all()


def test_swag_moments_of_collected_weights():
    collected = 1000 + 1e-4 * randn(7, N, D)
    swag = SwagWeights.of_collected(collected, rank=3)
    torch.testing.assert_close(swag.mean, collected.mean(0))
    torch.testing.assert_close(swag.variance, collected.var(0, unbiased=False), rtol=1e-7, atol=0)
    for index, found in zip(range(4, 7), swag.deviations, strict=True):
        expected = collected[index] - collected[: index + 1].mean(0)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    assert len(SwagWeights.of_collected(collected).deviations) == 7


def test_fewer_than_two_collections():
    with pytest.raises(ValueError, match="collect weights at least twice"):
        SwagWeights.of_collected(randn(1, N, D))
    with pytest.raises(ValueError, match="there is 1; collect"):
        SwagWeights.of_collected(randn(5, N, D), rank=1)
    with pytest.raises(ValueError, match="there is 0; collect"):
        SwagWeights.of_collected(randn(5, N, D), rank=0)


def test_ensemble():
    members = randn(5, TOKENS, N)
    distribution = ensemble_logits(members)
    torch.testing.assert_close(distribution.mean, members.mean(0))
    for token in range(TOKENS):
        torch.testing.assert_close(distribution.covariance()[token], members[:, token].T.cov())
    assert_traces(distribution)
    numbers = noise(TOKENS * distribution.noise_width).view(SAMPLES, TOKENS, -1)
    assert_covariance(distribution, distribution.sample(numbers))


def test_one_member_and_equal_members():
    members = randn(1, TOKENS, N)
    for count in (1, 4):
        distribution = ensemble_logits(members.expand(count, TOKENS, N))
        torch.testing.assert_close(distribution.mean, members[0], rtol=1e-15, atol=0)
        assert distribution.covariance().abs().max() < 1e-30
