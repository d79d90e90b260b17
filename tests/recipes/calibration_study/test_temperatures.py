"""The regret of rules for a temperature."""

from __future__ import annotations

import math

import pytest
import torch
from study_cases import case

from recipes.calibration_study.temperatures import (
    RULES,
    evidence_temperature,
    on_logarithm,
    temperature_regrets,
)


def test_no_rule_beats_the_best_temperature_and_labels_help():
    regrets = temperature_regrets([case()], draws=5, counts=(10, 100))
    assert all(regret.value >= 0 for regret in regrets)
    plain = {regret.num_labels: regret.value for regret in regrets if regret.rule == "no prior"}
    assert plain[100] < plain[10]
    without = [regret.value for regret in regrets if "without labels" in regret.rule]
    assert without[0] == pytest.approx(without[1])


def test_regret_is_the_nll_above_that_of_a_dense_grid():
    made = case(temperature=1.5)
    loss = torch.nn.functional.cross_entropy
    grid = [float(loss(made.test.logits / t, made.test.labels)) for t in torch.logspace(-1, 1, 2001).tolist()]
    found = temperature_regrets([made], draws=1, counts=(10,))
    (regret,) = [regret.value for regret in found if "without labels" in regret.rule]
    own = float(loss(made.test.logits / evidence_temperature(made), made.test.labels))
    assert regret == pytest.approx(1000 * (own - min(grid)), abs=0.01)


def test_the_control_agrees_with_a_dense_grid_of_the_logarithm():
    part = case().calibration.select(torch.arange(20))

    def objective(t):
        loss = float(torch.nn.functional.cross_entropy(part.logits / t, part.labels, reduction="sum"))
        return loss + (math.log(t) - math.log(1.2)) ** 2 / (2 * 0.2**2)

    best = min(torch.logspace(-1, 1, 4001).tolist(), key=objective)
    assert on_logarithm(part.logits, part.labels, 1.2) == pytest.approx(best, rel=2e-3)


def test_every_rule_is_measured_on_every_case():
    made = [case(seed=seed) for seed in range(2)]
    regrets = temperature_regrets(made, draws=1, counts=(10, 25))
    assert len(regrets) == len(RULES) * 2 * 2
