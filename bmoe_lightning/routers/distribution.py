"""Distributions over the logits of a router, one for each token.

Shapes: `mean [tokens, N]`; a covariance is never formed except on request. Variances and Kullback-Leibler divergences
are closed forms, as in https://arxiv.org/abs/2509.23830 and https://arxiv.org/abs/2603.09453. Choices by a softmax do
not see what is common to all logits of a token, so the variance that matters is the centred one, `tr(C Sigma C)` with
`C = I - 11^T / N`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_FULL_EXPERTS = 128
"""Maximum number of experts for a full covariance, which takes N^2 floats a token."""


@dataclass(frozen=True)
class LogitDistribution(ABC):
    """The first two moments of the logits of each token.

    Attributes:
        mean: Mean logits, `[tokens, N]`.
    """

    mean: Tensor

    @abstractmethod
    def trace(self) -> Tensor:
        """The sum of the variances of the logits, `[tokens]`."""

    @abstractmethod
    def centred_trace(self) -> Tensor:
        """The sum of the variances of the logits without their common shift, `tr(C Sigma C)`, `[tokens]`."""

    @abstractmethod
    def covariance(self) -> Tensor:
        """The covariance `[tokens, N, N]`."""


@dataclass(frozen=True)
class GaussianLogits(LogitDistribution):
    """A Gaussian over the logits of each token, by its mean and a square root of its covariance."""

    @property
    def noise_width(self) -> int:
        """Number of standard normal numbers that one sample of one token takes."""
        return self.mean.shape[-1]

    def sample(self, noise: Tensor) -> Tensor:
        """Samples of the logits.

        Args:
            noise: Standard normal numbers, `[S, tokens, noise_width]`; make them in chunks of S.

        Returns:
            `[S, tokens, N]` in the mean's dtype, differentiable in mean and scale.
        """
        return self.mean + self._deviations(noise.to(self.mean))

    def kl(self, prior_mean: Tensor, prior_scale: float | Tensor) -> Tensor:
        """Kullback-Leibler divergence from the prior `N(prior_mean, prior_scale^2 I)`, in nats.

        Args:
            prior_mean: `[tokens, N]`, usually the logits of the trained router.
            prior_scale: Standard deviation of each logit, a positive number.

        Returns:
            `[tokens]`; infinite where the covariance is singular.
        """
        prior_scale = torch.as_tensor(prior_scale, dtype=self.mean.dtype, device=self.mean.device)
        squares = self.trace() + (self.mean - prior_mean).square().sum(-1)
        num_experts = self.mean.shape[-1]
        log_dets = 2 * num_experts * prior_scale.log() - self.log_det()
        return 0.5 * (squares / prior_scale.square() - num_experts + log_dets)

    @abstractmethod
    def log_det(self) -> Tensor:
        """Logarithm of the determinant of the covariance, `[tokens]`."""

    @abstractmethod
    def _deviations(self, noise: Tensor) -> Tensor:
        """`[S, tokens, N]`: samples without the mean."""


@dataclass(frozen=True)
class DiagonalLogits(GaussianLogits):
    """Independent logits.

    Attributes:
        mean: Mean logits, `[tokens, N]`.
        scale: Standard deviations, any shape that broadcasts to `[tokens, N]`.
    """

    scale: Tensor

    def trace(self) -> Tensor:
        return self._variances.sum(-1)

    def centred_trace(self) -> Tensor:
        return (1 - 1 / self.mean.shape[-1]) * self.trace()

    def covariance(self) -> Tensor:
        return torch.diag_embed(self._variances)

    def log_det(self) -> Tensor:
        return 2 * self.scale.expand_as(self.mean).log().sum(-1)

    def _deviations(self, noise: Tensor) -> Tensor:
        return self.scale * noise

    @property
    def _variances(self) -> Tensor:
        return self.scale.square().expand_as(self.mean)


@dataclass(frozen=True)
class TriangularLogits(GaussianLogits):
    """A full covariance `L L^T`.

    Attributes:
        mean: Mean logits, `[tokens, N]`.
        scale: Lower-triangular L with a positive diagonal, `[tokens, N, N]` (see `lower_triangular`).

    Raises:
        ValueError: If there are too many experts.
    """

    scale: Tensor

    def __post_init__(self) -> None:
        check_full(self.mean.shape[-1])

    def trace(self) -> Tensor:
        return self.scale.square().sum((-2, -1))

    def centred_trace(self) -> Tensor:
        return _centred(self.scale).square().sum((-2, -1))

    def covariance(self) -> Tensor:
        return self.scale @ self.scale.mT

    def log_det(self) -> Tensor:
        return 2 * self.scale.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def _deviations(self, noise: Tensor) -> Tensor:
        return _products(self.scale, noise)


@dataclass(frozen=True)
class LowRankLogits(GaussianLogits):
    """A covariance `diag(d) + V V^T`.

    Attributes:
        mean: Mean logits, `[tokens, N]`.
        diagonal: Variances d, not negative, any shape that broadcasts to `[tokens, N]`.
        factor: V, `[tokens, N, r]`.
    """

    diagonal: Tensor
    factor: Tensor

    @property
    def noise_width(self) -> int:
        return self.mean.shape[-1] + self.factor.shape[-1]

    def trace(self) -> Tensor:
        return self._diagonal.sum(-1) + self.factor.square().sum((-2, -1))

    def centred_trace(self) -> Tensor:
        independent = (1 - 1 / self.mean.shape[-1]) * self._diagonal.sum(-1)
        return independent + _centred(self.factor).square().sum((-2, -1))

    def covariance(self) -> Tensor:
        return torch.diag_embed(self._diagonal) + self.factor @ self.factor.mT

    def log_det(self) -> Tensor:
        # det(D + V V^T) = det(D) det(I + V^T D^-1 V): r x r instead of N x N.
        scaled = self.factor / self._diagonal.sqrt().unsqueeze(-1)
        inner = torch.eye(self.factor.shape[-1]).to(scaled) + scaled.mT @ scaled
        return self._diagonal.log().sum(-1) + torch.linalg.slogdet(inner).logabsdet

    def _deviations(self, noise: Tensor) -> Tensor:
        independent, common = noise.split([self.mean.shape[-1], self.factor.shape[-1]], -1)
        return self.diagonal.sqrt() * independent + _products(self.factor, common)

    @property
    def _diagonal(self) -> Tensor:
        return self.diagonal.expand_as(self.mean)


def check_full(num_experts: int) -> None:
    """Refuse a full covariance of many experts.

    Raises:
        ValueError: If there are more than `MAX_FULL_EXPERTS`.
    """
    if num_experts > MAX_FULL_EXPERTS:
        raise ValueError(
            f"a full covariance of the logits of {num_experts} experts takes {num_experts**2} floats for each token, "
            f"and at most {MAX_FULL_EXPERTS} experts are supported; use a low-rank form, such as rank=8"
        )


def lower_triangular(values: Tensor) -> Tensor:
    """Lower-triangular matrices with a positive diagonal from unconstrained numbers.

    Args:
        values: `[..., N (N + 1) / 2]`: the lower triangle by rows; the diagonal goes through exp. Zeros give the
            identity.

    Returns:
        `[..., N, N]`.
    """
    num_experts = (math.isqrt(8 * values.shape[-1] + 1) - 1) // 2
    rows, columns = torch.tril_indices(num_experts, num_experts, device=values.device)
    diagonal = rows == columns
    # exp of the diagonal alone: another number may be so large that its exp, though not chosen, makes gradients NaN.
    triangle = torch.where(diagonal, torch.where(diagonal, values, 0).exp(), values)
    matrix = values.new_zeros(*values.shape[:-1], num_experts, num_experts)
    matrix[..., rows, columns] = triangle
    return matrix


def _centred(columns: Tensor) -> Tensor:
    """`C A` for `A [tokens, N, r]`."""
    return columns - columns.mean(-2, keepdim=True)


def _products(factor: Tensor, noise: Tensor) -> Tensor:
    """`[S, tokens, N]`: `A_t e_st` for `A [tokens, N, r]` and `e [S, tokens, r]`; A is not repeated."""
    return (factor @ noise.permute(1, 2, 0)).permute(2, 0, 1)
