import pytest
import torch
from oracles.calibration import adaptive_ece

from bmoe_lightning.metrics import AdaptiveCalibrationError, adaptive_calibration_error


@pytest.mark.parametrize("num_bins", [1, 6, 15, 90])
def test_equal_parts_of_the_sorted_examples(num_bins, predictions):
    log_probs, target = predictions(90)
    confidence, predicted = log_probs.exp().max(1)
    expected = adaptive_ece(confidence.numpy(), (predicted == target).double().numpy(), num_bins)
    found = adaptive_calibration_error(log_probs, target, num_bins=num_bins).item()
    assert found == pytest.approx(expected, abs=1e-12)


def test_an_example_at_an_edge_is_split(binary):
    # Three examples in two bins: the second counts half in each.
    found = adaptive_calibration_error(*binary([0.6, 0.7, 0.8], [True, False, True]), num_bins=2).item()
    assert found == pytest.approx((abs(0.4 - 0.35) + abs(-0.35 + 0.2)) / 3)


def test_ties_count_with_their_mean(binary):
    # Four equal examples, half of them right, in two bins: no order may be seen.
    found = adaptive_calibration_error(*binary([0.75] * 4, [True, True, False, False]), num_bins=2).item()
    assert found == pytest.approx(0.25)


def test_one_example(binary):
    assert adaptive_calibration_error(*binary([0.9], [False])).item() == pytest.approx(0.9)


def test_the_number_of_bins_is_checked_and_reaches_the_class(predictions):
    log_probs, target = predictions(40)
    twin = AdaptiveCalibrationError(num_bins=5)
    twin.update(log_probs, target)
    torch.testing.assert_close(twin.compute(), adaptive_calibration_error(log_probs, target, num_bins=5))
    for call in (
        lambda: AdaptiveCalibrationError(0),
        lambda: adaptive_calibration_error(log_probs, target, num_bins=0),
    ):
        with pytest.raises(ValueError, match="num_bins"):
            call()
