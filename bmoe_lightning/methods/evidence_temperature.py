"""The evidence temperature: one temperature from the posterior, without labels.

Serving takes one forward pass: once T is fitted, the posterior is no longer needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bmoe_lightning.curvature.spec import Curvature
from bmoe_lightning.laplace.predictive import MIN_UNLABELLED, mean_variance, temperature_from_variances
from bmoe_lightning.laplace.prior import SCOPES, Scope
from bmoe_lightning.methods.base import CurvatureMethod, State, check_choice, scalar
from bmoe_lightning.methods.batch_view import BatchView
from bmoe_lightning.methods.needs import Needs
from bmoe_lightning.methods.options import option
from bmoe_lightning.methods.posterior_options import prior_mean_option, scope_option
from bmoe_lightning.methods.temperature_search import fit_temperature, negative_log_likelihood
from bmoe_lightning.methods.workbench import PRIOR_MEANS, PriorMeanName, Workbench
from bmoe_lightning.utils.fit_warnings import collected_fit_warnings, warn_of_fit

_FAR = 2.0
_SIGNIFICANT = 6.63  # the 99 % quantile of chi-squared with one degree of freedom


@dataclass(frozen=True)
class EvidenceTemperature(CurvatureMethod):
    """`softmax(f / T)` with `T = sqrt(1 + pi/4 median_n v_n)` over unlabelled inputs; the accuracy is unchanged.

    `v_n` is the mean variance of the centred logits under the posterior whose prior precision maximises the evidence.
    The probit factor is from MacKay 1992, The Evidence Framework Applied to Classification Networks
    (https://doi.org/10.1162/neco.1992.4.5.720). T does not account for label noise or underfitting, and is too large
    where fine-tuning moved the weights far although the data are unambiguous.

    Raises:
        ValueError: If the scope or prior mean is unknown, the Fisher is not `exact`, or `min_inputs` is below 1.
    """

    name: str = "evidence_temperature"
    label: str = "Evidence temperature"
    scope: Scope = scope_option()
    prior_mean: PriorMeanName = prior_mean_option()
    min_inputs: int = option(
        MIN_UNLABELLED, "Number of held-out inputs below which the fit is refused: their median is noisy.", trial=1
    )

    positive_state = ("temperature",)
    source = "https://doi.org/10.1162/neco.1992.4.5.720"

    def __post_init__(self) -> None:
        check_choice("scope", self.scope, SCOPES)
        check_choice("prior_mean", self.prior_mean, PRIOR_MEANS)
        if self.min_inputs < 1:
            raise ValueError(f"{self.name} needs at least one held-out input, got min_inputs={self.min_inputs}")
        if self.curvature is not None and self.curvature.fisher != "exact":
            raise ValueError(f"{self.name} needs a curvature with fisher='exact', got {self.curvature.fisher!r}")

    @property
    def needs(self) -> Needs:
        return Needs(calibration_inputs=self.min_inputs, prior_mean=self.prior_mean == "pretrained")

    @property
    def prediction_curvatures(self) -> tuple[Curvature, ...]:
        return ()

    def fit(self, work: Workbench) -> State:
        return {"temperature": evidence_temperature(work, self.spec, self.scope, self.prior_mean, self.min_inputs)}

    def log_probs(self, batch: BatchView, state: State) -> Tensor:
        return (batch.logits / state["temperature"].to(batch.logits)).log_softmax(-1)

    def refit(self, state: State, logits: Tensor, labels: Tensor) -> State | None:
        return state  # labels are not used


def evidence_temperature(
    work: Workbench, curvature: Curvature, scope: Scope, prior_mean: PriorMeanName, min_inputs: int
) -> Tensor:
    """The evidence temperature over the held-out inputs, a float64 scalar.

    Raises:
        ValueError: If there are fewer than `min_inputs` inputs.
    """
    cache = work.covariances(curvature)
    covariance = cache.covariance(work.evidence_precision(curvature, scope, prior_mean))
    temperature = temperature_from_variances(mean_variance(cache.logits, covariance), min_inputs=min_inputs)
    try:
        labelled = cache.labelled()
    except ValueError:  # labels are not needed here, so there may be none, or any
        return scalar(temperature)
    warn_if_far_from_labels(temperature, *labelled)
    return scalar(temperature)


def warn_if_far_from_labels(temperature: float, logits: Tensor, labels: Tensor) -> None:
    """Warn if the temperature that held-out labels ask for is another one; it is not used otherwise.

    Args:
        temperature: Evidence temperature.
        logits: Logits `[N, K]`, `-inf` for absent classes.
        labels: Labels `[N]`.

    Warns:
        FitWarning: If the two differ by a factor of 2 or more and a likelihood ratio test on the labels tells them
            apart (at 1 %).
    """
    with collected_fit_warnings():  # that one is at a bound is the business of the method that uses it
        fitted = fit_temperature(logits, labels)
    if max(fitted / temperature, temperature / fitted) < _FAR:
        return
    both = torch.tensor([temperature, fitted], dtype=torch.float64).log()
    at_evidence, at_fitted = negative_log_likelihood(logits, labels, both).tolist()
    if 2 * (at_evidence - at_fitted) > _SIGNIFICANT:
        reason = (
            "the evidence does not see label noise or a failure to learn"
            if fitted > temperature
            else "the evidence counts how far the weights moved, though the data are clear"
        )
        warn_of_fit(
            f"the evidence temperature is {temperature:.3g}, but the {len(labels)} held-out labels ask for "
            f"{fitted:.3g}: {reason}; use a temperature fitted on labels",
            stacklevel=2,
        )
