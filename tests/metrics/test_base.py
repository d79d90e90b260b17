"""What holds for every class twin."""

import pytest
import torch
from torchmetrics import MetricCollection

from bmoe_lightning.metrics import (
    Accuracy,
    BrierScore,
    ExpectedCalibrationError,
    NegativeLogLikelihood,
    ReliabilityDiagram,
    accuracy,
    brier_score,
    expected_calibration_error,
    negative_log_likelihood,
)

TWINS = [
    (Accuracy, accuracy),
    (NegativeLogLikelihood, negative_log_likelihood),
    (BrierScore, brier_score),
    (ExpectedCalibrationError, expected_calibration_error),
]
ALL = [*(twin for twin, _ in TWINS), ReliabilityDiagram]


@pytest.mark.parametrize(("twin", "function"), TWINS)
def test_unequal_batches_give_the_value_of_all(twin, function, predictions):
    log_probs, target = predictions()
    metric = twin()
    for part in (slice(0, 7), slice(7, 60), slice(60, 90)):
        on_batch = metric(log_probs[part], target[part])
        assert on_batch.item() == pytest.approx(function(log_probs[part], target[part]).item(), abs=1e-12)
    assert metric.compute().item() == pytest.approx(function(log_probs, target).item(), abs=1e-12)
    assert metric.compute().dtype == torch.float64


@pytest.mark.parametrize("twin", ALL)
def test_two_processes_add_up(twin, predictions):
    log_probs, target = predictions()
    whole, first, second = twin(), twin(), twin()
    whole.update(log_probs, target)
    first.update(log_probs[:31], target[:31])
    second.update(log_probs[31:], target[31:])
    assert all(reduction is not None for reduction in first._reductions.values())
    for state, reduction in first._reductions.items():
        stacked = torch.stack([getattr(first, state), getattr(second, state)])
        setattr(first, state, reduction(stacked))
    first._computed = None
    torch.testing.assert_close(first.compute(), whole.compute(), equal_nan=True, rtol=0, atol=1e-12)


def test_state_names_are_all_different():
    names = [state for twin in ALL for state in twin()._defaults]
    assert len(names) == len(set(names)) == 3 * 2 + 2 * 3
    assert all(state.dtype == torch.float64 for twin in ALL for state in twin()._defaults.values())


@pytest.mark.parametrize("compute_groups", [True, False])
def test_a_collection_never_mixes_metrics_up(compute_groups, predictions):
    # First batch: accuracy, NLL and Brier sums all equal 0 or agree, which is when grouping goes wrong.
    sure = torch.tensor([[0.0, -torch.inf]], dtype=torch.float64)
    log_probs, target = predictions(40, classes=2)
    collection = MetricCollection({t.__name__: t() for t, _ in TWINS}, compute_groups=compute_groups)
    collection.update(sure, torch.tensor([0]))
    collection.update(log_probs, target)
    values = collection.compute()
    log_probs, target = torch.cat([sure, log_probs]), torch.cat([torch.tensor([0]), target])
    for twin, function in TWINS:
        assert values[twin.__name__].item() == pytest.approx(function(log_probs, target).item(), abs=1e-12)


@pytest.mark.parametrize("twin", ALL)
def test_reset_in_inference_mode_then_update_outside(twin, predictions):
    log_probs, target = predictions()
    metric = twin()
    with torch.inference_mode():
        metric.update(log_probs, target)
        metric.compute()
        metric.reset()
    metric.update(log_probs, target)
    metric(log_probs, target)
    fresh = twin()
    fresh.update(log_probs, target)
    fresh.update(log_probs, target)
    torch.testing.assert_close(metric.compute(), fresh.compute(), equal_nan=True)


@pytest.mark.parametrize(("twin", "function"), TWINS)
def test_a_module_moved_to_bfloat16_does_not_cost_precision(twin, function, predictions):
    log_probs, target = predictions(600)
    module = torch.nn.Module()
    module.metric = twin()
    module.to(torch.bfloat16)
    for part in range(0, 600, 100):
        module.metric.update(log_probs[part : part + 100], target[part : part + 100])
    assert module.metric.compute().item() == pytest.approx(function(log_probs, target).item(), abs=1e-12)


@pytest.mark.parametrize("twin", [NegativeLogLikelihood, BrierScore])
def test_gradients_flow_through_the_batch_value_where_promised(twin, predictions):
    log_probs, target = predictions(20)
    logits = log_probs.clone().requires_grad_()
    metric = twin()
    assert metric.is_differentiable
    metric(logits.log_softmax(1), target).backward()
    assert logits.grad.abs().sum() > 0
    assert not any(getattr(metric, state).requires_grad for state in metric._defaults)


@pytest.mark.parametrize("twin", ALL)
def test_compute_before_update_warns_and_invents_no_value(twin):
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        value = twin().compute()
    value = value if isinstance(value, torch.Tensor) else value[2]
    assert torch.isnan(value).all()


@pytest.mark.parametrize("twin", ALL)
def test_logits_are_refused(twin):
    with pytest.raises(ValueError, match="log_softmax"):
        twin().update(torch.randn(5, 3), torch.zeros(5, dtype=torch.long))


def test_states_are_restored_from_a_state_dict(predictions):
    log_probs, target = predictions()
    metric = NegativeLogLikelihood()
    metric.persistent(True)
    metric.update(log_probs, target)
    other = NegativeLogLikelihood()
    other.persistent(True)
    other.load_state_dict(metric.state_dict())
    other.update(log_probs, target)
    assert other.nll_count == 180
