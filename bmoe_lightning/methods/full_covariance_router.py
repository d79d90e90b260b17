"""Full-covariance variational routers: correlated Gaussian logits of every router, trained beside the model."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bmoe_lightning.methods.options import option
from bmoe_lightning.methods.variational_router import GaussianRouterMethod
from bmoe_lightning.routers.base import BayesianRouter
from bmoe_lightning.routers.costs import RouterCost, low_rank_cost, triangular_cost
from bmoe_lightning.routers.full_covariance import FullCovarianceLogits, check_form, check_rank
from bmoe_lightning.routers.types import Router


@dataclass(frozen=True)
class FullCovarianceRouter(GaussianRouterMethod):
    """Averages predictions over routes, sampled from trained correlated Gaussians over the logits of every router.

    `N(l + A u, L(u) L(u)^T)` around the trained router's logits `l`, as the FCVR of https://arxiv.org/abs/2509.23830
    and the VGLR-FC of https://arxiv.org/abs/2603.09453, with the differences of the mean-field router; or, with a
    `rank`, `diag(d) + V V^T`, for many experts. The variance of the logits is read off L and not sampled, without what
    is common to all logits of a token, which no softmax sees.

    Weak as the mean-field router is, from which it did not differ where it was measured, at N^2 floats a token.
    """

    name: str = "full_covariance_router"
    label: str = "Full-covariance router"
    rank: int | None = option(None, "Number of columns of V; None for the full form, of at most 128 experts.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank is not None:
            check_rank(self.rank)

    def check_router(self, router: Router) -> None:
        check_form(router.num_experts, self.rank)

    def token_cost(self, d_in: int, num_experts: int, num_samples: int) -> RouterCost:
        if self.rank is None:
            return triangular_cost(d_in, num_experts, num_samples, self.hidden)
        return low_rank_cost(d_in, num_experts, num_samples, self.rank, self.hidden)

    def make_net(self, router: Router, unit: float, way: bool, dtype: torch.dtype, seed: int) -> BayesianRouter:
        shape = {"rank": self.rank, "hidden": self.hidden}
        return FullCovarianceLogits(router, self.scale_of(unit), **shape, seed=seed, dtype=dtype)
