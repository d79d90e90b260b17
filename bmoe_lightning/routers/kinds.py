"""The kinds of Bayesian routers that are trained with a model, by name, and their options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from bmoe_lightning.routers.base import BayesianRouter
from bmoe_lightning.routers.full_covariance import FullCovarianceLogits
from bmoe_lightning.routers.mean_field import MeanFieldLogits
from bmoe_lightning.routers.temperature import TemperatureChoice
from bmoe_lightning.routers.types import Router


@dataclass(frozen=True)
class RouterOptions:
    """What describes Bayesian routers besides the model that they stand beside.

    Attributes:
        kind: Name of their kind: `mean_field`, `full_covariance` or `temperature`.
        rank: Rank of the covariances of `full_covariance`; None for the full form.
        hidden: Width of the hidden layers; by default D / 4.
        seed: Seed of the first weights.

    Raises:
        ValueError: If the kind is unknown, or has no rank.
    """

    kind: str = "mean_field"
    rank: int | None = None
    hidden: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown kind of Bayesian router {self.kind!r}; valid are {', '.join(KINDS)}")
        if self.rank is not None and KINDS[self.kind] is not full_covariance:
            raise ValueError(
                f"rank={self.rank} is the rank of a covariance, which routers of kind {self.kind!r} do not have; use "
                f"kind={full_covariance.__name__!r}, or leave rank out"
            )
        if self.hidden is not None and self.hidden < 1:
            raise ValueError(f"hidden must be at least 1, got {self.hidden}")

    def make(self, router: Router, dtype: torch.dtype) -> BayesianRouter:
        """A Bayesian router beside a router, which need not be probed yet.

        Gaussians have the prior scale 0, so that they are the router itself; see `GaussianRouter.rescale`.

        Args:
            router: The router.
            dtype: Dtype of the trained part.
        """
        return KINDS[self.kind](router, self, dtype)


def mean_field(router: Router, options: RouterOptions, dtype: torch.dtype) -> BayesianRouter:
    """Independent Gaussian logits."""
    return MeanFieldLogits(router, 0.0, hidden=options.hidden, seed=options.seed, dtype=dtype)


def full_covariance(router: Router, options: RouterOptions, dtype: torch.dtype) -> BayesianRouter:
    """Correlated Gaussian logits."""
    shape = {"rank": options.rank, "hidden": options.hidden}
    return FullCovarianceLogits(router, 0.0, **shape, seed=options.seed, dtype=dtype)


def temperature(router: Router, options: RouterOptions, dtype: torch.dtype) -> BayesianRouter:
    """Experts drawn with a temperature of each token."""
    return TemperatureChoice(router, hidden=options.hidden, seed=options.seed, dtype=dtype)


def check_draws_experts(kind: str) -> None:
    """Check that routers of a kind draw experts, so that draws have probabilities.

    Args:
        kind: Name of the kind.

    Raises:
        ValueError: If they do not.
    """
    if KINDS[kind] is not temperature:
        raise ValueError(
            f"score_function is the gradient of drawn experts, which routers of kind {kind!r} do not have; use "
            f"kind={temperature.__name__!r}, or leave it out"
        )


KINDS: dict[str, Callable[[Router, RouterOptions, torch.dtype], BayesianRouter]] = {
    make.__name__: make for make in (mean_field, full_covariance, temperature)
}
"""Functions that make a Bayesian router, by the name of its kind."""
