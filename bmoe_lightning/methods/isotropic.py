"""The baseline without curvature: the same logit covariance, with an isotropic Gaussian instead of K-FAC."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bmoe_lightning.curvature.spec import Curvature
from bmoe_lightning.laplace.covariance_cache import CovarianceCache
from bmoe_lightning.laplace.predictive import LinkName, check_link, class_probabilities
from bmoe_lightning.laplace.prior import fit_lpo
from bmoe_lightning.methods.base import PRIOR_PRECISION, CurvatureMethod, State
from bmoe_lightning.methods.batch_view import BatchView
from bmoe_lightning.methods.needs import Needs
from bmoe_lightning.methods.options import option
from bmoe_lightning.methods.posterior_options import link_option, num_samples_option
from bmoe_lightning.methods.workbench import Workbench
from bmoe_lightning.utils.fit_warnings import warn_of_fit

_LOG_VARIANCE_RANGE = (math.log(1e-8), math.log(1e4))
_BISECTIONS = 40
_FIT_SAMPLES = 1000


@dataclass(frozen=True)
class Isotropic(CurvatureMethod):
    """Gaussian `N(W, sigma^2 I)` over `down_proj` of every expert: logit covariance `sigma^2 J J^T`, no curvature pass.

    With labels, sigma minimises validation NLL. Without, it is the largest one that changes the mean NLL of the model's
    predicted labels by at most `tolerance`, the rule of Shi et al. 2024, Training-Free Bayesianization for Low-Rank
    Adapters of Large Language Models. The gain of the Laplace methods over this one is the gain from curvature.

    Raises:
        ValueError: If the tolerance is not positive, the link is unknown, or there is less than one sample.
    """

    name: str = "isotropic"
    label: str = "Isotropic"
    use_labels: bool = option(True, "Whether sigma is fitted on held-out labels; otherwise none are used.")
    tolerance: float = option(0.003, "Accepted relative change of the NLL, without labels.")
    link: LinkName = link_option()
    num_samples: int = num_samples_option()

    positive_state = (PRIOR_PRECISION,)
    source = "https://arxiv.org/abs/2412.05723"
    cost = "one forward pass and K - 1 backward passes to the experts' outputs"

    def __post_init__(self) -> None:
        check_link(self.link, self.num_samples)
        if not 0 < self.tolerance < math.inf:
            raise ValueError(f"tolerance must be a positive number, got {self.tolerance}")

    @property
    def curvatures(self) -> tuple[Curvature, ...]:
        return tuple(curvature.without_pass() for curvature in super().curvatures)

    @property
    def needs(self) -> Needs:
        advised = 25 if self.use_labels else 0
        return Needs(calibration_inputs=1, calibration_labels=self.use_labels, advised_labels=advised)

    def fit(self, work: Workbench) -> State:
        (curvature,) = self.curvatures
        if self.use_labels:
            work.labelled_logits()  # checks the labels before the search
            return {PRIOR_PRECISION: fit_lpo(work.covariances(curvature), "global", seed=work.seed)}
        cache = work.covariances(curvature)
        variance = largest_variance(cache, self.tolerance, seed=work.seed)
        return {PRIOR_PRECISION: torch.full((cache.num_layers,), 1 / variance, dtype=torch.float64)}

    def log_probs(self, batch: BatchView, state: State) -> Tensor:
        (curvature,) = self.curvatures
        logits, covariance = batch.covariance(curvature, state[PRIOR_PRECISION])
        return class_probabilities(logits, covariance, self.link, num_samples=self.num_samples, seed=batch.seed)

    def hyperparameters(self, state: State) -> dict[str, float]:
        return {"sigma": float(state[PRIOR_PRECISION][0]) ** -0.5}


def largest_variance(cache: CovarianceCache, tolerance: float, *, seed: int = 0) -> float:
    """The largest sigma^2 that changes the mean NLL of the model's predicted labels by at most a tolerance.

    Args:
        cache: Held-out inputs under a curvature of rank 0.
        tolerance: Accepted change relative to the NLL of the model itself.
        seed: Seed for the Monte Carlo noise.

    Returns:
        sigma^2, between 1e-8 and 1e4.

    Raises:
        ValueError: If even the smallest variance changes the NLL by more.

    Warns:
        FitWarning: If even the largest variance changes it by less.
    """
    predicted = cache.logits.argmax(1, keepdim=True)
    num_layers = cache.num_layers

    def nll(log_probs: Tensor) -> float:
        return float(-log_probs.gather(1, predicted).mean())

    def is_accepted(log_variance: float) -> bool:
        precision = torch.full((num_layers,), math.exp(-log_variance), dtype=torch.float64)
        log_probs = class_probabilities(cache.logits, cache.covariance(precision), num_samples=_FIT_SAMPLES, seed=seed)
        return abs(nll(log_probs) - plain) <= tolerance * plain

    plain = nll(cache.logits.log_softmax(-1))
    low, high = _LOG_VARIANCE_RANGE
    if not is_accepted(low):
        raise ValueError(
            f"even a variance of {math.exp(low):.0e} changes the NLL of the model's predicted labels ({plain:.3g}) by "
            f"more than {tolerance:.1%}: the model is too confident for this rule on the held-out inputs. Use a larger "
            "tolerance, or fit on labels (use_labels=True)."
        )
    if is_accepted(high):
        warn_of_fit(
            f"sigma^2 is at the end of its search range ({math.exp(high):.3g}): no variance changes the NLL of the "
            f"model's predicted labels by more than {tolerance:.1%}, so the experts hardly affect the "
            "logits; check the layers",
            stacklevel=2,
        )
        return math.exp(high)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if is_accepted(middle) else (low, middle)
    return math.exp(low)
