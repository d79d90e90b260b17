import pytest
import torch
from oracles.calibration import classwise_ece

from bmoe_lightning.metrics import ClasswiseCalibrationError, classwise_calibration_error


@pytest.mark.parametrize(("classes", "num_bins"), [(2, 15), (4, 15), (4, 7), (3, 1)])
def test_against_numpy(classes, num_bins, predictions):
    log_probs, target = predictions(200, classes)
    expected = classwise_ece(log_probs.exp().numpy(), target.numpy(), num_bins)
    found = classwise_calibration_error(log_probs, target, num_bins=num_bins).item()
    assert found == pytest.approx(expected, abs=1e-12)
    assert found > 0


def test_a_position_bias_shows_where_the_top_label_is_calibrated():
    """All of a model's .7 answers are class 0 and .7 of them right; the rest of the labels is class 1 and never 2."""
    p = torch.tensor([[0.7, 0.15, 0.15]], dtype=torch.float64).log().repeat(10, 1)
    target = torch.tensor([0] * 7 + [1] * 3)
    assert classwise_calibration_error(p, target).item() == pytest.approx((0 + 0.15 + 0.15) / 3)


def test_a_class_is_weighted_by_the_examples_that_have_it():
    p = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.4, 0.4, 0.2]], dtype=torch.float64)
    target = torch.tensor([0, 1, 2])
    log_probs = p.log()
    # Seven pairs of an example and a class. The .5s of classes 0 and 1 are calibrated; .4, .4 and .2 are not.
    assert classwise_calibration_error(log_probs, target).item() == pytest.approx((0.4 + 0.4 + 0.8) / 7)


def test_the_label_of_an_absent_class_counts_against_it():
    p = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64).log()
    assert classwise_calibration_error(p, torch.tensor([2])).item() == pytest.approx(2 / 3)


def test_settings_are_checked_and_reach_the_class(predictions):
    log_probs, target = predictions(40)
    twin = ClasswiseCalibrationError(5, "left")
    twin.update(log_probs, target)
    expected = classwise_calibration_error(log_probs, target, num_bins=5, convention="left")
    torch.testing.assert_close(twin.compute(), expected)
    with pytest.raises(ValueError, match="convention"):
        ClasswiseCalibrationError(5, "both")
    with pytest.raises(ValueError, match="num_bins"):
        classwise_calibration_error(log_probs, target, num_bins=0)
