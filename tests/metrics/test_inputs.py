"""What all metrics take and refuse."""

import math

import pytest
import torch

from bmoe_lightning.metrics import (
    accuracy,
    brier_score,
    expected_calibration_error,
    negative_log_likelihood,
    reliability_curve,
)
from bmoe_lightning.metrics.inputs import NORMALISATION_TOLERANCE, check_predictions, top_label

SCALARS = [accuracy, negative_log_likelihood, brier_score, expected_calibration_error]


def test_a_probability_rounded_above_one_is_clamped_and_nothing_is_softmaxed_again(predictions):
    log_probs, target = predictions(50)
    log_probs[0] = torch.tensor([1e-7, -40.0, -40.0, -40.0])
    exact = log_probs.clone()
    exact[0, 0] = 0.0
    for metric in SCALARS:
        assert metric(log_probs, target).item() == pytest.approx(metric(exact, target).item(), abs=1e-6)
    assert top_label(*check_predictions(log_probs, target))[0].max() == 1.0


def test_bfloat16_is_accepted_and_close(predictions):
    log_probs, target = predictions(400)
    half = log_probs.bfloat16()
    assert torch.logsumexp(half.double(), 1).abs().max() > NORMALISATION_TOLERANCE
    assert negative_log_likelihood(half, target).item() == pytest.approx(
        negative_log_likelihood(log_probs, target).item(), abs=2e-3
    )
    assert brier_score(half, target).item() == pytest.approx(brier_score(log_probs, target).item(), abs=5e-3)
    # The bin sums are not rounded to bfloat16: with 400 examples in one bin they would be.
    curve = reliability_curve(half, target, num_bins=1)
    assert curve.count.item() == 400
    assert curve.confidence.item() == pytest.approx(log_probs.max(1).values.exp().mean().item(), abs=2e-3)


@pytest.mark.parametrize("metric", SCALARS)
def test_absent_classes_change_nothing(metric, predictions):
    log_probs, target = predictions(100, classes=3)
    ragged = torch.cat([log_probs, torch.full((100, 2), -torch.inf, dtype=torch.float64)], 1)
    assert torch.equal(metric(ragged, target), metric(log_probs, target))


def test_results_are_float64(predictions):
    log_probs, target = predictions(dtype=torch.float32)
    assert all(metric(log_probs, target).dtype == torch.float64 for metric in SCALARS)


@pytest.mark.parametrize("metric", [*SCALARS, reliability_curve])
@pytest.mark.parametrize(
    ("log_probs", "target", "error", "message"),
    [
        (torch.randn(4, 3), torch.zeros(4, dtype=torch.long), ValueError, "apply log_softmax"),
        (torch.full((4, 3), 1 / 3), torch.zeros(4, dtype=torch.long), ValueError, "apply log_softmax"),
        (torch.full((4, 3), -torch.inf), torch.zeros(4, dtype=torch.long), ValueError, "apply log_softmax"),
        (torch.full((4, 3), torch.inf), torch.zeros(4, dtype=torch.long), ValueError, "apply log_softmax"),
        (torch.tensor([[math.nan, 0.0]]), torch.zeros(1, dtype=torch.long), ValueError, "NaN in 1 rows"),
        (torch.zeros(2, 1), torch.tensor([0, 1]), ValueError, r"\[0, 1\).*0 to 1"),
        (torch.zeros(2, 1), torch.tensor([-1, 0]), ValueError, "-1 to 0"),
        (torch.zeros(2, 1), torch.zeros(3, dtype=torch.long), ValueError, r"\[2, 1\] and \[3\]"),
        (torch.zeros(2), torch.zeros(2, dtype=torch.long), ValueError, r"\[N, K\]"),
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), ValueError, "at least one example"),
        (torch.zeros(2, 1), torch.zeros(2), TypeError, "class indices"),
        (torch.zeros(2, 1, dtype=torch.long), torch.zeros(2, dtype=torch.long), TypeError, "floating"),
    ],
)
def test_refusals(metric, log_probs, target, error, message):
    with pytest.raises(error, match=message):
        metric(log_probs, target)
