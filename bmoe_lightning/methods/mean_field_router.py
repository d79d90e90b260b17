"""Mean-field variational routers: the logits of every router are independent Gaussians, trained beside the model."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bmoe_lightning.methods.variational_router import GaussianRouterMethod
from bmoe_lightning.routers.base import BayesianRouter
from bmoe_lightning.routers.costs import RouterCost, diagonal_cost
from bmoe_lightning.routers.mean_field import MeanFieldLogits
from bmoe_lightning.routers.types import Router


@dataclass(frozen=True)
class MeanFieldRouter(GaussianRouterMethod):
    """Averages predictions over routes, sampled from trained independent Gaussians over the logits of every router.

    `N(l + A u, diag sigma^2(u))` around the trained router's logits `l`, with a small network for sigma, as the MFVR of
    https://arxiv.org/abs/2509.23830 and the VGLR-MF of https://arxiv.org/abs/2603.09453. Unlike there, predictions are
    averaged and not router scores, training starts at the prior with A = 0, `beta` multiplies a mean over tokens, and
    padding is left out.

    Weak where the model has memorised the training data: there the likelihood wants no noise, and training shrinks it.
    Where a family normalises weights over the chosen experts, the others' logits get no gradient but the prior's.
    `A u` fine-tunes the router, which is no gain of Bayesian inference: `num_samples=0` predicts with it alone.
    """

    name: str = "mean_field_router"
    label: str = "Mean-field router"

    def token_cost(self, d_in: int, num_experts: int, num_samples: int) -> RouterCost:
        return diagonal_cost(d_in, num_experts, num_samples, self.hidden)

    def make_net(self, router: Router, unit: float, way: bool, dtype: torch.dtype, seed: int) -> BayesianRouter:
        return MeanFieldLogits(router, self.scale_of(unit), hidden=self.hidden, seed=seed, dtype=dtype)
