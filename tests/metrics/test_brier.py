import math

import pytest

from bmoe_lightning.metrics.brier import SPEC, brier_score


def test_against_a_loop(predictions):
    log_probs, target = predictions(300)
    rows = zip(log_probs.tolist(), target.tolist(), strict=True)
    brier = sum(sum((math.exp(v) - (k == y)) ** 2 for k, v in enumerate(row)) for row, y in rows) / 300
    assert brier_score(log_probs, target).item() == pytest.approx(brier, abs=1e-12)


def test_best_and_worst(binary):
    assert brier_score(*binary([1.0, 1.0], [True, True])) == 0
    assert brier_score(*binary([1.0, 1.0], [False, False])) == 2


def test_lower_is_better():
    assert SPEC.header == "Brier ↓"
