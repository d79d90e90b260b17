"""The evidence temperature: a temperature from the posterior, without labels; and one fitted with a few, shrunk to it.

Both are served by a plain forward pass: once T is known, the posterior is no longer needed.
"""

from __future__ import annotations

import math
from typing import Self

from torch import Tensor

from bmoe_lightning.methods.method import BatchView, Method
from bmoe_lightning.methods.temperature import (
    TEMPERATURE_RANGE,
    check_calibration,
    check_temperature,
    minimise,
    negative_log_likelihood,
)

PRIOR_STD = 0.2
"""Standard deviation of the logarithm of the evidence temperature around that of the best one, as measured."""


class EvidenceTemperature(Method):
    """`softmax(f / T)` with T from `LaplacePosterior.evidence_temperature`.

    Args:
        temperature: T.

    Raises:
        ValueError: if the temperature is not positive and finite.
    """

    name = "evidence_temperature"
    label = "Evidence temperature"

    def __init__(self, temperature: float) -> None:
        self.temperature = check_temperature(temperature)

    def log_probs(self, view: BatchView) -> Tensor:
        """Log-probabilities of one batch: `[B, K]` float64, `-inf` for absent classes."""
        return (view.logits / self.temperature).log_softmax(-1)

    def hyperparameters(self) -> dict[str, float]:
        """The temperature."""
        return {"temperature": self.temperature}


class ShrunkTemperature(EvidenceTemperature):
    """`softmax(f / T)` with T fitted on labels and shrunk towards the evidence temperature.

    Args:
        temperature: T, from `fit_shrunk_temperature`.

    Raises:
        ValueError: if the temperature is not positive and finite.
    """

    name = "shrunk_temperature"
    label = "Shrunk temperature"

    @classmethod
    def fit(cls, logits: Tensor, labels: Tensor, evidence_temperature: float, *, prior_std: float = PRIOR_STD) -> Self:
        """Fit on held-out data; arguments as in `fit_shrunk_temperature`."""
        return cls(fit_shrunk_temperature(logits, labels, evidence_temperature, prior_std=prior_std))


def fit_shrunk_temperature(
    logits: Tensor, labels: Tensor, evidence_temperature: float, *, prior_std: float = PRIOR_STD
) -> float:
    """Minimise `sum_n NLL(softmax(f_n / T)) + (log T - log T_ev)^2 / (2 prior_std^2)` over log T.

    With no labels this is the evidence temperature, with many it is temperature scaling.

    Args:
        logits: `[N, K]`, `-inf` for absent classes; N may be 0.
        labels: `[N]` int64.
        evidence_temperature: T_ev.
        prior_std: how far log T_ev is trusted.

    Returns:
        T.

    Raises:
        ValueError: if a temperature or `prior_std` is not positive and finite, and for what `fit_temperature` refuses
            but an empty set.
    """
    centre = math.log(check_temperature(evidence_temperature))
    if not (math.isfinite(prior_std) and prior_std > 0):
        raise ValueError(f"prior_std must be positive and finite, got {prior_std}")
    logits, labels = check_calibration(logits, labels)
    if len(labels) == 0:
        return float(evidence_temperature)

    def objective(log_temperature: Tensor) -> Tensor:
        penalty = (log_temperature - centre).square() / (2 * prior_std**2)
        return negative_log_likelihood(logits, labels, log_temperature) + penalty

    low, high = (math.log(value) for value in TEMPERATURE_RANGE)
    return math.exp(minimise(objective, min(low, centre), max(high, centre)))
