import pytest
import torch
from torchmetrics.functional.classification import multiclass_calibration_error

from bmoe_lightning.metrics.binning import Binning
from bmoe_lightning.metrics.ece import SPEC, ExpectedCalibrationError, convention_text, expected_calibration_error


def loop_reference(log_probs, target, num_bins, closed_right):
    bins = {}
    for row, y in zip(log_probs.exp().tolist(), target.tolist(), strict=True):
        confidence = max(row)
        for b in range(num_bins):
            lo, hi = b / num_bins, (b + 1) / num_bins
            inside = lo < confidence <= hi if closed_right else lo <= confidence < hi
            if inside or (not closed_right and b == num_bins - 1 and confidence == 1.0):
                bins.setdefault(b, []).append((confidence, row.index(confidence) == y))
    total = len(target)
    return sum(abs(sum(c for c, _ in v) - sum(r for _, r in v)) for v in bins.values()) / total


@pytest.mark.parametrize("num_bins", [1, 4, 15, 40])
@pytest.mark.parametrize("convention", ["right", "left"])
def test_against_a_loop(num_bins, convention, predictions):
    log_probs, target = predictions(300)
    expected = loop_reference(log_probs, target, num_bins, convention == "right")
    value = expected_calibration_error(log_probs, target, num_bins=num_bins, convention=convention)
    assert value.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("norm", ["l1", "l2", "max"])
@pytest.mark.parametrize("num_bins", [10, 15])
@pytest.mark.parametrize("convention", ["right", "left"])
def test_equals_torchmetrics_off_the_edges(norm, num_bins, convention, predictions):
    log_probs, target = predictions(500)
    theirs = multiclass_calibration_error(log_probs.exp(), target, num_classes=4, n_bins=num_bins, norm=norm)
    ours = expected_calibration_error(log_probs, target, num_bins=num_bins, convention=convention, norm=norm)
    # torchmetrics bins in float32.
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)
    assert ours > 0.01


@pytest.mark.parametrize("convention", ["right", "left"])
def test_confidence_one_belongs_to_the_last_bin(convention, binary):
    log_probs, target = binary([1.0, 0.95], [False, True])
    assert expected_calibration_error(log_probs, target, convention=convention).item() == pytest.approx(0.475)
    theirs = multiclass_calibration_error(log_probs.exp(), target, num_classes=2, n_bins=15)
    assert theirs.item() == pytest.approx(0.525)


def test_the_closed_side_of_a_bin(binary):
    # With two bins, .5 is the inner edge: (0, .5] takes it to the first bin, [.5, 1) to the second.
    log_probs, target = binary([0.5, 0.75], [True, False])
    assert log_probs[0, 0].exp() == 0.5
    ece = expected_calibration_error(log_probs, target, num_bins=2)
    assert ece.item() == pytest.approx((0.5 + 0.75) / 2)
    ece = expected_calibration_error(log_probs, target, num_bins=2, convention="left")
    assert ece.item() == pytest.approx(0.125)


@pytest.mark.parametrize("settings", [{"convention": "left"}, {"convention": "right"}, {"norm": "max"}, {"norm": "l2"}])
def test_settings_reach_the_class(settings, binary):
    log_probs, target = binary([0.5, 0.75], [True, False])
    metric = ExpectedCalibrationError(num_bins=2, **settings)
    metric.update(log_probs, target)
    assert metric.compute() == expected_calibration_error(log_probs, target, num_bins=2, **settings)


@pytest.mark.parametrize("norm", ["l1", "l2", "max"])
def test_empty_is_nan_for_every_norm(norm):
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert torch.isnan(ExpectedCalibrationError(norm=norm).compute())


@pytest.mark.parametrize("wrong", [{"num_bins": 0}, {"convention": "both"}, {"norm": "l3"}])
def test_wrong_settings_are_refused(wrong, predictions):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        expected_calibration_error(*predictions(5), **wrong)
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ExpectedCalibrationError(**wrong)


def test_the_convention_is_stated():
    words = "top-label confidence, 5 equal-width bins [lo, hi), weighted by the items in a bin"
    assert convention_text(Binning(5, "left")) == words
    assert SPEC.note(Binning(5, "left")) == f"ECE: {words}."
    assert SPEC.header == "ECE ↓"
