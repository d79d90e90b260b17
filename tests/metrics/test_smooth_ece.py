import numpy as np
import pytest
import torch
from oracles.calibration import smooth_ece

from bmoe_lightning.metrics import expected_calibration_error, smooth_calibration_error
from bmoe_lightning.metrics.bootstrap import draw_resamples
from bmoe_lightning.metrics.smooth_ece import MIN_BANDWIDTH, _weighted


@pytest.mark.parametrize(("number", "scale"), [(60, 1.0), (60, 0.5), (7, 2.0), (120, 0.7)])
def test_against_reflected_gaussians_on_a_grid(number, scale, predictions):
    log_probs, target = predictions(number)
    log_probs = (scale * log_probs).log_softmax(1)
    confidence, predicted = log_probs.exp().max(1)
    expected = smooth_ece(confidence.numpy(), (predicted == target).double().numpy())
    assert smooth_calibration_error(log_probs, target).item() == pytest.approx(expected, abs=1e-5)
    assert expected > 0.02


def test_the_bandwidth_equals_the_error(predictions):
    """Resamples find theirs together; each is as exact as alone."""
    log_probs, target = predictions(50)
    [drawn] = draw_resamples(50, 20, 0)
    together = _weighted(log_probs, target)(drawn.counts)
    alone = torch.cat([_weighted(log_probs, target)(row[None]) for row in drawn.counts])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-9)
    assert float(together.std()) > 0.005


def test_gaps_of_one_sign_have_their_mean(binary):
    """Every answer right with confidence .7 .. .9: the residual is positive everywhere, so smoothing keeps its sum."""
    confidences = np.linspace(0.7, 0.9, 30).tolist()
    value = smooth_calibration_error(*binary(confidences, [True] * 30)).item()
    assert value == pytest.approx(1 - np.mean(confidences), abs=1e-6)
    assert smooth_calibration_error(*binary([1.0, 1.0], [True, True])).item() == pytest.approx(0, abs=1e-12)
    tiny = smooth_calibration_error(*binary([1 - 1e-4] * 5, [True] * 5)).item()
    assert tiny == pytest.approx(1e-4, abs=1e-7)
    assert tiny < MIN_BANDWIDTH


def test_small_where_a_calibrated_model_has_a_large_ece(predictions):
    log_probs, target = predictions(300)
    log_probs = (log_probs / 2).log_softmax(1)
    assert smooth_calibration_error(log_probs, target) < expected_calibration_error(log_probs, target)
