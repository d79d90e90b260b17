"""Laplace posterior with the prior precision from the evidence, followed by temperature scaling."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bmoe_lightning.laplace.predictive import LinkName, class_probabilities
from bmoe_lightning.methods.base import PRIOR_PRECISION, State, scalar
from bmoe_lightning.methods.batch_view import BatchView
from bmoe_lightning.methods.laplace_evidence import LaplaceEvidence
from bmoe_lightning.methods.needs import Needs
from bmoe_lightning.methods.posterior_options import link_option, num_samples_option
from bmoe_lightning.methods.temperature_search import fit_temperature
from bmoe_lightning.methods.workbench import Workbench


@dataclass(frozen=True)
class LaplaceTemperature(LaplaceEvidence):
    """Temperature scaling of the predictive log-probabilities of `LaplaceEvidence`, normalised again.

    The temperature is fitted to the predictive on held-out data, so link and samples affect the fit.
    Temperature scaling: Guo et al. 2017 (https://arxiv.org/abs/1706.04599).
    """

    name: str = "laplace_temperature"
    label: str = "Bayesian-MoE + temperature"
    link: LinkName = link_option(prediction_only=False)
    num_samples: int = num_samples_option(prediction_only=False)

    positive_state = (PRIOR_PRECISION, "temperature")

    @property
    def needs(self) -> Needs:
        return Needs(calibration_labels=True, advised_labels=25, prior_mean=self.prior_mean == "pretrained")

    def fit(self, work: Workbench) -> State:
        state = super().fit(work)
        cache = work.covariances(self.spec)
        logits, labels = cache.labelled()
        covariance = cache.covariance(state[PRIOR_PRECISION])
        log_probs = class_probabilities(logits, covariance, self.link, num_samples=self.num_samples, seed=work.seed)
        return {**state, "temperature": scalar(fit_temperature(log_probs, labels))}

    def log_probs(self, batch: BatchView, state: State) -> Tensor:
        log_probs = super().log_probs(batch, state)
        return (log_probs / state["temperature"].to(log_probs)).log_softmax(-1)
