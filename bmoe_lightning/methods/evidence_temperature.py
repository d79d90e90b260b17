"""The evidence temperature: one temperature from the posterior, without labels.

Serving takes one forward pass: once T is fitted, the posterior is no longer needed.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bmoe_lightning.curvature.spec import Curvature
from bmoe_lightning.laplace.predictive import MIN_UNLABELLED, mean_variance, temperature_from_variances
from bmoe_lightning.laplace.prior import SCOPES, Scope
from bmoe_lightning.methods.base import CurvatureMethod, State, check_choice, option, scalar
from bmoe_lightning.methods.batch_view import BatchView
from bmoe_lightning.methods.needs import Needs
from bmoe_lightning.methods.workbench import PRIOR_MEANS, PriorMeanName, Workbench


@dataclass(frozen=True)
class EvidenceTemperature(CurvatureMethod):
    """`softmax(f / T)` with `T = sqrt(1 + pi/4 median_n v_n)` over unlabelled inputs; the accuracy is unchanged.

    `v_n` is the mean variance of the centred logits under the posterior whose prior precision maximises the evidence.
    The probit factor is from MacKay 1992, The Evidence Framework Applied to Classification Networks
    (https://doi.org/10.1162/neco.1992.4.5.720). T does not account for label noise or underfitting, and is too large
    where fine-tuning moved the weights far although the data are unambiguous.

    Raises:
        ValueError: If the scope or prior mean is unknown, or the Fisher is not `exact`.
    """

    name: str = "evidence_temperature"
    label: str = "Evidence temperature"
    scope: Scope = option("layer", "Scope of the prior precision: one per layer (`layer`), or a single one (`global`).")
    prior_mean: PriorMeanName = option(
        "pretrained", "Prior mean: the weights before fine-tuning (`pretrained`), or `zero`."
    )

    source = "https://doi.org/10.1162/neco.1992.4.5.720"

    def __post_init__(self) -> None:
        check_choice("scope", self.scope, SCOPES)
        check_choice("prior_mean", self.prior_mean, PRIOR_MEANS)
        if self.curvature is not None and self.curvature.fisher != "exact":
            raise ValueError(f"{self.name} needs a curvature with fisher='exact', got {self.curvature.fisher!r}")

    @property
    def needs(self) -> Needs:
        return Needs(calibration_inputs=MIN_UNLABELLED, prior_mean=self.prior_mean == "pretrained")

    @property
    def prediction_curvatures(self) -> tuple[Curvature, ...]:
        return ()

    def fit(self, work: Workbench) -> State:
        return {"temperature": evidence_temperature(work, self.spec, self.scope, self.prior_mean)}

    def log_probs(self, batch: BatchView, state: State) -> Tensor:
        return (batch.logits / state["temperature"].to(batch.logits)).log_softmax(-1)

    def refit(self, state: State, logits: Tensor, labels: Tensor) -> State | None:
        return state  # labels are not used


def evidence_temperature(work: Workbench, curvature: Curvature, scope: Scope, prior_mean: PriorMeanName) -> Tensor:
    """The evidence temperature over the held-out inputs, a float64 scalar.

    Raises:
        ValueError: If there are fewer than 100 inputs.
    """
    logits, _ = work.calibration_logits()
    covariance = work.covariances(curvature).covariance(work.evidence_precision(curvature, scope, prior_mean))
    return scalar(temperature_from_variances(mean_variance(logits, covariance)))
