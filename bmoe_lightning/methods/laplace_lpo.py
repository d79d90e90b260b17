"""Laplace posterior over the experts, with the prior precision from a validation split (LPO)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from bmoe_lightning.laplace.predictive import LinkName, check_link, class_probabilities
from bmoe_lightning.laplace.prior import SCOPES, LogNormalPrior, Scope, fit_lpo
from bmoe_lightning.methods.base import PRIOR_PRECISION, CurvatureMethod, State, check_choice
from bmoe_lightning.methods.batch_view import BatchView
from bmoe_lightning.methods.needs import Needs
from bmoe_lightning.methods.options import option
from bmoe_lightning.methods.posterior_options import link_option, num_samples_option, prior_mean_option, scope_option
from bmoe_lightning.methods.uncertainty import posterior_uncertainty
from bmoe_lightning.methods.workbench import PRIOR_MEANS, PriorMeanName, Workbench

_ADVISED_LABELS = 64


@dataclass(frozen=True)
class LaplaceLPO(CurvatureMethod):
    """Laplace posterior over `down_proj` of every expert; the prior precision minimises validation NLL (LPO).

    Dialameh et al. 2025, Bayesian Mixture of Experts for Large Language Models; the optimisation over a validation
    split follows Yang et al. 2023, Bayesian Low-rank Adaptation for Large Language Models
    (https://arxiv.org/abs/2308.13111).

    Raises:
        ValueError: If the scope or link is unknown, or there is less than one sample.
    """

    name: str = "laplace_lpo"
    label: str = "Bayesian-MoE (LPO)"
    scope: Scope = scope_option()
    evidence_width: float | None = option(
        None,
        "Standard deviation of a Gaussian prior on the log prior precisions around those that maximise the evidence, "
        "which matters with few labels; None is no prior.",
    )
    prior_mean: PriorMeanName = prior_mean_option("Prior mean of the evidence")
    link: LinkName = link_option()
    num_samples: int = num_samples_option()

    positive_state: ClassVar[tuple[str, ...]] = (PRIOR_PRECISION,)
    source = "https://arxiv.org/abs/2511.08968"
    cost = "one forward pass and K - 1 backward passes to the experts' outputs"

    def __post_init__(self) -> None:
        check_choice("scope", self.scope, SCOPES)
        check_choice("prior_mean", self.prior_mean, PRIOR_MEANS)
        if self.evidence_width is not None and not 0 < self.evidence_width < math.inf:
            raise ValueError(f"evidence_width must be a positive number or None, got {self.evidence_width}")
        check_link(self.link, self.num_samples)

    @property
    def needs(self) -> Needs:
        pretrained = self.evidence_width is not None and self.prior_mean == "pretrained"
        return Needs(calibration_labels=True, advised_labels=_ADVISED_LABELS, prior_mean=pretrained)

    def fit(self, work: Workbench) -> State:
        work.labelled_logits()  # checks the labels before the optimisation
        prior = self._prior(work)
        cache, names = work.covariances(self.spec), work.layer_names(self.spec)
        return {PRIOR_PRECISION: fit_lpo(cache, self.scope, prior=prior, seed=work.seed, names=names)}

    def _prior(self, work: Workbench) -> LogNormalPrior | None:
        """The prior on the log precisions, if there is one."""
        if self.evidence_width is None:
            return None
        return LogNormalPrior(work.evidence_precision(self.spec, self.scope, self.prior_mean), self.evidence_width)

    def log_probs(self, batch: BatchView, state: State) -> Tensor:
        logits, covariance = batch.covariance(self.spec, state[PRIOR_PRECISION])
        return class_probabilities(logits, covariance, self.link, num_samples=self.num_samples, seed=batch.seed)

    def uncertainty(self, batch: BatchView, state: State) -> dict[str, Tensor]:
        return posterior_uncertainty(batch, self.spec, state[PRIOR_PRECISION])
