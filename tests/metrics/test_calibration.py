import pytest
import torch

from bmoe_lightning.metrics import (
    accuracy,
    brier_score,
    expected_calibration_error,
    negative_log_likelihood,
)
from bmoe_lightning.metrics import calibration as C

FUNCTIONS = {
    "acc": accuracy,
    "ece": expected_calibration_error,
    "nll": negative_log_likelihood,
    "brier": brier_score,
}


def test_values_are_those_of_the_functions(predictions):
    log_probs, target = predictions()
    values = C.calibration_values(log_probs, target)
    assert values == {name: function(log_probs, target).item() for name, function in FUNCTIONS.items()}
    assert tuple(values) == C.METRIC_NAMES


@pytest.mark.parametrize("settings", [{}, {"num_bins": 7}, {"num_bins": 3, "convention": "left"}])
def test_the_collection_has_the_same_values(settings, predictions):
    log_probs, target = predictions()
    log_probs[0] = torch.tensor([0.5, 0.25, 0.25, 0.0], dtype=torch.float64).log()
    collection = C.calibration_metrics(**settings)
    collection.update(log_probs, target)
    values = {name: value.item() for name, value in collection.compute().items()}
    assert values == pytest.approx(C.calibration_values(log_probs, target, **settings), abs=1e-12)
    assert set(collection.clone(prefix="test/").keys()) == {f"test/{name}" for name in C.METRIC_NAMES}


def test_logits_and_settings_are_refused(predictions):
    log_probs, target = predictions(5)
    with pytest.raises(ValueError, match="log_softmax"):
        C.calibration_values(log_probs.exp(), target)
    with pytest.raises(ValueError, match="num_bins"):
        C.calibration_values(log_probs, target, num_bins=0)
    with pytest.raises(ValueError, match="convention"):
        C.calibration_metrics(convention="both")
