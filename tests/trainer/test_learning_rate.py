"""Learning-rate schedules."""

from __future__ import annotations

import math

import pytest

from bmoe_lightning.trainer.learning_rate import learning_rate_factor


def test_learning_rate_factors():
    linear = [learning_rate_factor(step, 10, 2, "linear") for step in range(11)]
    assert linear == pytest.approx([0.5, 1.0, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0.0])
    cosine = [learning_rate_factor(step, 8, 0, "cosine") for step in (0, 2, 4, 8, 9)]
    assert cosine == pytest.approx([1, 0.5 + math.sqrt(2) / 4, 0.5, 0, 0])
    assert [learning_rate_factor(step, math.inf, 0, "constant") for step in (0, 10**9)] == [1, 1]
    assert learning_rate_factor(1, 8, 4, "constant") == 0.5
