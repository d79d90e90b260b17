"""Gaussians over router logits against dense ones and torch.distributions."""

from __future__ import annotations

import pytest
import torch
from torch import distributions

from bmoe_lightning.routers.distribution import (
    MAX_FULL_EXPERTS,
    DiagonalLogits,
    LowRankLogits,
    TriangularLogits,
    check_full,
    lower_triangular,
)

TOKENS, N, RANK = 3, 5, 2
PRIOR_SCALES = pytest.mark.parametrize("prior_scale", [1.0, 0.3, 2.5])
FORMS = pytest.mark.parametrize("form", ["diagonal", "isotropic", "triangular", "low_rank"])


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def parameters(form):
    """The unconstrained parameters of a form, its mean first."""
    shapes = {
        "diagonal": [(TOKENS, N)],
        "isotropic": [()],
        "triangular": [(TOKENS, N * (N + 1) // 2)],
        "low_rank": [(TOKENS, N), (TOKENS, N, RANK)],
    }
    return [randn(*shape).mul(0.5).requires_grad_() for shape in [(TOKENS, N), *shapes[form]]]


def build(form, mean, first, *rest):
    if form == "triangular":
        return TriangularLogits(mean, lower_triangular(first))
    if form == "low_rank":
        return LowRankLogits(mean, first.exp(), *rest)
    return DiagonalLogits(mean, first.exp())


def identity_noise(distribution):
    """Noise that reveals the square root of a covariance, a column for each sample."""
    width = distribution.noise_width
    return torch.eye(width, dtype=torch.float64).unsqueeze(1).expand(width, TOKENS, width)


@FORMS
@PRIOR_SCALES
def test_divergence_equals_that_of_dense_gaussians(form, prior_scale):
    distribution = build(form, *parameters(form))
    prior_mean = randn(TOKENS, N)
    prior = distributions.MultivariateNormal(
        prior_mean, prior_scale**2 * torch.eye(N, dtype=torch.float64).expand(TOKENS, N, N)
    )
    dense = distributions.MultivariateNormal(distribution.mean, distribution.covariance())
    expected = distributions.kl_divergence(dense, prior)
    torch.testing.assert_close(distribution.kl(prior_mean, prior_scale), expected, rtol=1e-10, atol=1e-10)
    scale = torch.tensor(prior_scale, dtype=torch.float64)
    torch.testing.assert_close(distribution.kl(prior_mean, scale), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(distribution.log_det(), torch.logdet(distribution.covariance()), rtol=1e-10, atol=1e-10)


def test_divergence_of_independent_logits():
    mean, prior_mean, scale = randn(TOKENS, N), randn(TOKENS, N), randn(TOKENS, N).exp()
    prior = distributions.Normal(prior_mean, 0.7)
    expected = distributions.kl_divergence(distributions.Normal(mean, scale), prior).sum(-1)
    torch.testing.assert_close(DiagonalLogits(mean, scale).kl(prior_mean, 0.7), expected, rtol=1e-10, atol=1e-10)


def test_all_forms_agree_on_independent_logits():
    mean, prior_mean, scale = randn(TOKENS, N), randn(TOKENS, N), randn(TOKENS, N).exp()
    diagonal = DiagonalLogits(mean, scale)
    others = [
        TriangularLogits(mean, torch.diag_embed(scale)),
        LowRankLogits(mean, scale.square(), torch.zeros(TOKENS, N, RANK, dtype=torch.float64)),
    ]
    noise = randn(4, TOKENS, N + RANK)
    for other in others:
        torch.testing.assert_close(other.kl(prior_mean, 0.7), diagonal.kl(prior_mean, 0.7), rtol=1e-12, atol=1e-12)
        found = other.sample(noise[..., : other.noise_width])
        torch.testing.assert_close(found, diagonal.sample(noise[..., :N]), rtol=1e-12, atol=1e-12)


@FORMS
def test_divergence_from_itself_is_zero_and_otherwise_positive(form):
    distribution = build(form, *parameters(form))
    assert (distribution.kl(distribution.mean, 1.0) > 0).all()
    prior = DiagonalLogits(distribution.mean, torch.tensor(0.4, dtype=torch.float64))
    torch.testing.assert_close(prior.kl(distribution.mean, 0.4), torch.zeros(TOKENS, dtype=torch.float64))


@FORMS
def test_samples_and_traces_follow_the_covariance(form):
    distribution = build(form, *parameters(form))
    root = (distribution.sample(identity_noise(distribution)) - distribution.mean).permute(1, 2, 0)
    covariance = distribution.covariance()
    torch.testing.assert_close(root @ root.mT, covariance, rtol=1e-12, atol=1e-12)
    traces = covariance.diagonal(dim1=1, dim2=2).sum(1)
    torch.testing.assert_close(distribution.trace(), traces, rtol=1e-12, atol=0)
    centring = torch.eye(N, dtype=torch.float64) - 1 / N
    centred = (centring @ covariance @ centring).diagonal(dim1=1, dim2=2).sum(1)
    torch.testing.assert_close(distribution.centred_trace(), centred, rtol=1e-12, atol=0)


def test_a_common_shift_has_no_centred_variance():
    common = LowRankLogits(randn(TOKENS, N), torch.tensor(0.0), torch.ones(TOKENS, N, 1, dtype=torch.float64))
    assert (common.trace() == N).all()
    assert (common.centred_trace() == 0).all()


@FORMS
def test_gradients(form):
    tensors = parameters(form)
    prior_mean = randn(TOKENS, N)
    noise = randn(2, TOKENS, build(form, *tensors).noise_width)

    def everything(prior_scale, *tensors):
        distribution = build(form, *tensors)
        return (
            distribution.kl(prior_mean, prior_scale),
            distribution.sample(noise),
            distribution.trace(),
            distribution.centred_trace(),
        )

    prior_scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(everything, (prior_scale, *tensors))


@FORMS
def test_chunks_of_samples_and_the_dtype_of_the_mean(form):
    distribution = build(form, *parameters(form))
    noise = torch.randn(6, TOKENS, distribution.noise_width)
    every = distribution.sample(noise)
    assert every.dtype == torch.float64
    torch.testing.assert_close(torch.cat([distribution.sample(chunk) for chunk in noise.split(4)]), every)


def test_no_copy_of_a_matrix_for_each_sample():
    """The largest tensor of 64 samples has fewer floats than four matrices a token."""
    largest = []

    class Sizes(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            output = func(*args, **(kwargs or {}))
            if isinstance(output, torch.Tensor):
                largest.append(output.untyped_storage().nbytes())
            return output

    distribution = TriangularLogits(torch.zeros(2, 64), torch.eye(64).expand(2, 64, 64))
    noise = torch.randn(64, 2, 64)
    with Sizes():
        distribution.sample(noise)
    assert largest
    assert max(largest) < 4 * 4 * 2 * 64 * 64


def test_a_full_covariance_of_many_experts_is_refused():
    check_full(MAX_FULL_EXPERTS)
    with pytest.raises(ValueError, match=r"129 experts takes 16641 floats .* low-rank form"):
        check_full(129)
    with pytest.raises(ValueError, match="low-rank form"):
        TriangularLogits(torch.zeros(1, 256), torch.eye(256).unsqueeze(0))


def test_lower_triangles():
    values = randn(TOKENS, N * (N + 1) // 2)
    matrix = lower_triangular(values)
    assert matrix.shape == (TOKENS, N, N)
    assert (matrix.triu(1) == 0).all()
    assert (matrix.diagonal(dim1=1, dim2=2) > 0).all()
    assert torch.equal(matrix[:, 2, :2], values[:, 3:5])
    assert torch.equal(matrix[:, 2, 2], values[:, 5].exp())
    torch.testing.assert_close(lower_triangular(torch.zeros(6)), torch.eye(3))
    large = torch.tensor([0.0, 1000.0, 0.0], requires_grad=True)
    lower_triangular(large).sum().backward()
    assert torch.equal(large.grad, torch.ones(3))
