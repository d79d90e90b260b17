"""Laplace posterior over the experts, with the prior precision from the evidence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from bmoe_lightning.laplace.predictive import LinkName, check_link, class_probabilities
from bmoe_lightning.laplace.prior import SCOPES, Scope
from bmoe_lightning.methods.base import PRIOR_PRECISION, CurvatureMethod, State, check_choice
from bmoe_lightning.methods.batch_view import BatchView
from bmoe_lightning.methods.needs import Needs
from bmoe_lightning.methods.posterior_options import link_option, num_samples_option, prior_mean_option, scope_option
from bmoe_lightning.methods.uncertainty import posterior_uncertainty
from bmoe_lightning.methods.workbench import PRIOR_MEANS, PriorMeanName, Workbench


@dataclass(frozen=True)
class LaplaceEvidence(CurvatureMethod):
    """Laplace posterior over `down_proj` of every expert; the prior precision maximises the evidence.

    It uses no held-out data. MacKay 1992, The Evidence Framework Applied to Classification Networks
    (https://doi.org/10.1162/neco.1992.4.5.720); Dialameh et al. 2025, Bayesian Mixture of Experts for Large Language
    Models.

    Raises:
        ValueError: If the scope, prior mean or link is unknown, or there is less than one sample.
    """

    name: str = "laplace_evidence"
    label: str = "Bayesian-MoE (evidence)"
    scope: Scope = scope_option()
    prior_mean: PriorMeanName = prior_mean_option()
    link: LinkName = link_option()
    num_samples: int = num_samples_option()

    positive_state: ClassVar[tuple[str, ...]] = (PRIOR_PRECISION,)
    source = "https://arxiv.org/abs/2511.08968"
    cost = "one forward pass and K - 1 backward passes to the experts' outputs"

    def __post_init__(self) -> None:
        check_choice("scope", self.scope, SCOPES)
        check_choice("prior_mean", self.prior_mean, PRIOR_MEANS)
        check_link(self.link, self.num_samples)

    @property
    def needs(self) -> Needs:
        return Needs(prior_mean=self.prior_mean == "pretrained")

    def fit(self, work: Workbench) -> State:
        return {PRIOR_PRECISION: work.evidence_precision(self.spec, self.scope, self.prior_mean)}

    def log_probs(self, batch: BatchView, state: State) -> Tensor:
        logits, covariance = batch.covariance(self.spec, state[PRIOR_PRECISION])
        return class_probabilities(logits, covariance, self.link, num_samples=self.num_samples, seed=batch.seed)

    def uncertainty(self, batch: BatchView, state: State) -> dict[str, Tensor]:
        return posterior_uncertainty(batch, self.spec, state[PRIOR_PRECISION])
