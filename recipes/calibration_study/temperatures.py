"""The regret of temperatures that are fitted on a few labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bmoe_lightning.laplace.predictive import mean_variance, temperature_from_variances
from bmoe_lightning.methods.shrunk_temperature import CENTRE, WIDTH, fit_shrunk_temperature
from bmoe_lightning.methods.temperature_search import (
    TEMPERATURE_RANGE,
    fit_temperature,
    minimise,
    negative_log_likelihood,
)
from bmoe_lightning.utils.fit_warnings import collected_fit_warnings
from recipes.calibration_study.cases import Case

NUM_LABELS = (10, 25, 50, 100)

Rule = Callable[[Tensor, Tensor, float], float]
"""Temperature from logits `[N, K]`, labels `[N]` and the temperature of the evidence."""


def on_logarithm(logits: Tensor, labels: Tensor, centre: float) -> float:
    """T under a Gaussian prior on log T, the control: it holds T back where the labels speak for uniform answers."""

    def objective(log_temperature: Tensor) -> Tensor:
        penalty = (log_temperature - math.log(centre)).square() / (2 * WIDTH**2)
        return negative_log_likelihood(logits, labels, log_temperature) + penalty

    return math.exp(minimise(objective, *(math.log(value) for value in TEMPERATURE_RANGE)))


RULES: Mapping[str, Rule] = {
    "no prior": lambda logits, labels, _: fit_temperature(logits, labels),
    "prior on log T around that of the evidence": on_logarithm,
    "prior on 1/T around that of the evidence": lambda logits, labels, t: fit_shrunk_temperature(
        logits, labels, centre=1 / t
    ),
    f"prior on 1/T around {CENTRE}": lambda logits, labels, _: fit_shrunk_temperature(logits, labels),
    "that of the evidence, without labels": lambda _logits, _labels, t: t,
}


@dataclass(frozen=True)
class Regret:
    """How much a rule loses on one case.

    Attributes:
        case: The case.
        rule: Name of the rule.
        num_labels: Number of labels.
        value: NLL on the test questions above that of the best temperature, in thousandths of a nat, mean over draws.
    """

    case: Case
    rule: str
    num_labels: int
    value: float


def evidence_temperature(case: Case) -> float:
    """The evidence temperature of a case, over all its calibration questions."""
    covariance = case.calibration.cache.covariance(case.precisions["layer"])
    return temperature_from_variances(mean_variance(case.calibration.logits, covariance))


def temperature_regrets(cases: Iterable[Case], draws: int, counts: Sequence[int] = NUM_LABELS) -> list[Regret]:
    """The regret of every rule on every case and number of labels.

    Args:
        cases: The cases.
        draws: Draws of each number of labels.
        counts: Numbers of labels.
    """
    found = []
    for case in cases:
        logits, labels = case.calibration.logits, case.calibration.labels
        least, evidence = _loss(case, _best(case)), evidence_temperature(case)
        for count in counts:
            generator = torch.Generator().manual_seed(1000 * case.seed + count)
            chosen = [torch.randperm(len(labels), generator=generator)[:count] for _ in range(draws)]
            for name, rule in RULES.items():
                # Ten correct predictions do not determine a temperature, and showing that is the purpose here.
                with collected_fit_warnings():
                    losses = [_loss(case, rule(logits[some], labels[some], evidence)) for some in chosen]
                found.append(Regret(case, name, count, 1000 * (sum(losses) / len(losses) - least)))
    return found


def _best(case: Case) -> float:
    low, high = (math.log(value) for value in TEMPERATURE_RANGE)
    return math.exp(minimise(lambda u: negative_log_likelihood(case.test.logits, case.test.labels, u), low, high))


def _loss(case: Case, temperature: float) -> float:
    log_temperature = torch.tensor([math.log(temperature)], dtype=torch.float64)
    total = negative_log_likelihood(case.test.logits, case.test.labels, log_temperature)
    return float(total) / len(case.test.labels)
