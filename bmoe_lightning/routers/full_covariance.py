"""Variational routers with a full or a low-rank covariance (https://arxiv.org/abs/2509.23830, 2603.09453)."""

from __future__ import annotations

import torch
from torch import Tensor

from bmoe_lightning.routers.base import drawn_matrix, hidden_width, zeros
from bmoe_lightning.routers.distribution import (
    GaussianLogits,
    LowRankLogits,
    TriangularLogits,
    check_full,
    lower_triangular,
)
from bmoe_lightning.routers.gaussian import GaussianRouter
from bmoe_lightning.routers.types import Router


class FullCovarianceLogits(GaussianRouter):
    """Correlated logits: `Sigma = L L^T` with a head for the lower triangle of L, or `diag(d) + V V^T`.

    The heads are zero at first, so that the distribution is the prior. L holds N^2 floats for each token, and the
    low-rank form N (1 + rank).

    Args:
        router: The router.
        prior_scale: Standard deviation of each logit under the prior.
        rank: Number of columns of V; None for the full form.
        hidden: Width H of the hidden layer; by default D / 4.
        seed: Seed of the hidden layer.
        dtype: Dtype of the trained part.

    Raises:
        ValueError: If there are too many experts for the full form, or the rank is not positive or larger than their
            number.
    """

    def __init__(
        self,
        router: Router,
        prior_scale: float,
        *,
        rank: int | None = None,
        hidden: int | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(router, prior_scale, dtype=dtype)
        check_form(router.num_experts, rank)
        self._rank = rank
        width, number = hidden_width(router.d_in, hidden), router.num_experts
        outputs = number * (number + 1) // 2 if rank is None else number * (1 + rank)
        self.hidden = drawn_matrix(width, router.d_in, seed=seed, router=router, dtype=dtype)
        self.head = zeros(outputs, width, dtype=dtype)

    def distribution(self, u: Tensor, logits: Tensor) -> GaussianLogits:
        values = (u.to(self.hidden.dtype) @ self.hidden.T).relu() @ self.head.T
        mean = self.mean(u, logits)
        if self._rank is None:
            return TriangularLogits(mean, (self.prior_scale * lower_triangular(values)).to(mean.dtype))
        log_variance, factor = values.split([self.router.num_experts, values.shape[-1] - self.router.num_experts], -1)
        diagonal = self.prior_scale.square() * log_variance.exp()
        factor = self.prior_scale * factor.unflatten(-1, (self.router.num_experts, self._rank))
        return LowRankLogits(mean, diagonal.to(mean.dtype), factor.to(mean.dtype))


def check_form(num_experts: int, rank: int | None) -> None:
    """Check that a covariance of so many experts can be computed.

    Raises:
        ValueError: If there are too many for the full form, or the rank is not positive or larger than their number.
    """
    if rank is None:
        check_full(num_experts)
        return
    check_rank(rank)
    if rank > num_experts:
        raise ValueError(
            f"rank={rank} is larger than the number of experts of a router, {num_experts}; pass a smaller rank, or "
            "None for the full form"
        )


def check_rank(rank: int) -> None:
    """Check that a rank is positive.

    Raises:
        ValueError: If it is not.
    """
    if rank < 1:
        raise ValueError(f"the low-rank form of a covariance needs a rank of at least 1, got {rank}")
