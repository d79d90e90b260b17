"""A temperature fitted on a few labels, shrunk towards the evidence temperature."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from bmoe_lightning.methods.base import State, scalar
from bmoe_lightning.methods.evidence_temperature import EvidenceTemperature, evidence_temperature
from bmoe_lightning.methods.needs import Needs
from bmoe_lightning.methods.temperature_search import (
    TEMPERATURE_RANGE,
    check_labelled,
    check_temperature,
    minimise,
    negative_log_likelihood,
)
from bmoe_lightning.methods.workbench import Workbench

PRIOR_STD = 0.2
"""Measured standard deviation of the log evidence temperature around the log of the best temperature."""


@dataclass(frozen=True)
class ShrunkTemperature(EvidenceTemperature):
    """`softmax(f / T)` with T fitted on held-out labels under a prior around the evidence temperature.

    Without labels it is the evidence temperature, with many it is temperature scaling. This is the method of Guo et al.
    2017 (https://arxiv.org/abs/1706.04599) with a penalty; the prior is particular to this library.
    """

    name: str = "shrunk_temperature"
    label: str = "Shrunk temperature"

    source = "https://arxiv.org/abs/1706.04599"

    @property
    def needs(self) -> Needs:
        return Needs(
            calibration_inputs=super().needs.calibration_inputs,
            calibration_labels=True,
            prior_mean=self.prior_mean == "pretrained",
        )

    def fit(self, work: Workbench) -> State:
        centre = evidence_temperature(work, self.spec, self.scope, self.prior_mean)
        return self.refit({"evidence_temperature": centre}, *work.labelled_logits())

    def refit(self, state: State, logits: Tensor, labels: Tensor) -> State:
        temperature = fit_shrunk_temperature(logits, labels, float(state["evidence_temperature"]))
        return {"temperature": scalar(temperature), "evidence_temperature": state["evidence_temperature"]}


def fit_shrunk_temperature(
    logits: Tensor, labels: Tensor, evidence_temperature: float, *, prior_std: float = PRIOR_STD
) -> float:
    """Minimise `sum_n NLL(softmax(f_n / T)) + (log T - log T_ev)^2 / (2 prior_std^2)` over log T.

    Without labels this is the evidence temperature, with many it is temperature scaling.

    Args:
        logits: Logits `[N, K]`, `-inf` for absent classes; N may be 0.
        labels: Labels `[N]` int64.
        evidence_temperature: Evidence temperature T_ev.
        prior_std: Standard deviation of the prior on log T around log T_ev.

    Returns:
        T.

    Raises:
        ValueError: If a temperature or `prior_std` is not positive and finite, or logits and labels are invalid; see
            `fit_temperature`.
    """
    centre = math.log(check_temperature(evidence_temperature))
    if not (math.isfinite(prior_std) and prior_std > 0):
        raise ValueError(f"prior_std must be positive and finite, got {prior_std}")
    logits, labels = check_labelled(logits, labels)
    if len(labels) == 0:
        return float(evidence_temperature)

    def objective(log_temperature: Tensor) -> Tensor:
        penalty = (log_temperature - centre).square() / (2 * prior_std**2)
        return negative_log_likelihood(logits, labels, log_temperature) + penalty

    low, high = (math.log(value) for value in TEMPERATURE_RANGE)
    return math.exp(minimise(objective, min(low, centre), max(high, centre)))
