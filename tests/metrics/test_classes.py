import matplotlib as mpl
import pytest
import torch
from torchmetrics import MetricCollection

from bmoe_lightning.metrics import classes as C
from bmoe_lightning.metrics import functional as F

TWINS = [
    (C.Accuracy, F.accuracy),
    (C.NegativeLogLikelihood, F.negative_log_likelihood),
    (C.BrierScore, F.brier_score),
    (C.ExpectedCalibrationError, F.expected_calibration_error),
]
ALL = [C.Accuracy, C.NegativeLogLikelihood, C.BrierScore, C.ExpectedCalibrationError, C.ReliabilityDiagram]


def predictions(number=90, seed=0, classes=4):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(number, classes, generator=generator, dtype=torch.float64)
    target = torch.multinomial((logits / 2).softmax(1), 1, generator=generator).squeeze(1)
    return logits.log_softmax(1), target


@pytest.mark.parametrize(("twin", "function"), TWINS)
def test_unequal_batches_give_the_value_of_the_whole(twin, function):
    log_probs, target = predictions()
    metric = twin()
    for part in (slice(0, 7), slice(7, 60), slice(60, 90)):
        on_batch = metric(log_probs[part], target[part])
        assert on_batch.item() == pytest.approx(function(log_probs[part], target[part]).item(), abs=1e-12)
    assert metric.compute().item() == pytest.approx(function(log_probs, target).item(), abs=1e-12)
    assert metric.compute().dtype == torch.float64


def test_ece_settings_reach_the_mathematics():
    log_probs = torch.tensor([[0.5, 0.5], [0.75, 0.25]], dtype=torch.float64).log()
    target = torch.tensor([0, 1])
    for settings in ({"convention": "left"}, {"convention": "right"}, {"norm": "max"}, {"norm": "l2"}):
        metric = C.ExpectedCalibrationError(num_bins=2, **settings)
        metric.update(log_probs, target)
        assert metric.compute() == F.expected_calibration_error(log_probs, target, num_bins=2, **settings)


@pytest.mark.parametrize("twin", ALL)
def test_two_processes_add_up(twin):
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
def test_a_collection_never_mixes_metrics_up(compute_groups):
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


def test_factory():
    collection = C.calibration_metrics(num_bins=7)
    assert set(collection.keys()) == {"acc", "ece", "nll", "brier"}
    assert collection._enable_compute_groups is False
    log_probs, target = predictions()
    collection.update(log_probs, target)
    values = collection.compute()
    assert values["ece"].item() == pytest.approx(
        F.expected_calibration_error(log_probs, target, num_bins=7).item(), abs=1e-12
    )
    prefixed = collection.clone(prefix="test/")
    assert set(prefixed.keys()) == {"test/acc", "test/ece", "test/nll", "test/brier"}


@pytest.mark.parametrize("twin", ALL)
def test_reset_in_inference_mode_then_update_outside(twin):
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
def test_a_module_moved_to_bfloat16_does_not_cost_precision(twin, function):
    log_probs, target = predictions(600)
    module = torch.nn.Module()
    module.metric = twin()
    module.to(torch.bfloat16)
    for part in range(0, 600, 100):
        module.metric.update(log_probs[part : part + 100], target[part : part + 100])
    assert module.metric.compute().item() == pytest.approx(function(log_probs, target).item(), abs=1e-12)


def test_gradients_flow_through_the_batch_value_only_where_promised():
    log_probs, target = predictions(20)
    for twin in (C.NegativeLogLikelihood, C.BrierScore):
        logits = log_probs.clone().requires_grad_()
        metric = twin()
        metric(logits.log_softmax(1), target).backward()
        assert logits.grad.abs().sum() > 0
        assert not any(getattr(metric, state).requires_grad for state in metric._defaults)


@pytest.mark.parametrize("twin", ALL)
def test_compute_before_update_warns_and_invents_no_value(twin):
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        value = twin().compute()
    value = value if isinstance(value, torch.Tensor) else value[2]
    assert torch.isnan(value).all()


@pytest.mark.parametrize("norm", ["l1", "l2", "max"])
def test_empty_calibration_error_is_nan_for_every_norm(norm):
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert torch.isnan(C.ExpectedCalibrationError(norm=norm).compute())


@pytest.mark.parametrize("twin", ALL)
def test_refuses_logits(twin):
    with pytest.raises(ValueError, match="log_softmax"):
        twin().update(torch.randn(5, 3), torch.zeros(5, dtype=torch.long))


def test_refuses_settings():
    with pytest.raises(ValueError, match="num_bins"):
        C.ReliabilityDiagram(num_bins=0)
    with pytest.raises(ValueError, match="norm"):
        C.ExpectedCalibrationError(norm="l7")


def test_states_are_restored_from_a_state_dict():
    log_probs, target = predictions()
    metric = C.NegativeLogLikelihood()
    metric.persistent(True)
    metric.update(log_probs, target)
    other = C.NegativeLogLikelihood()
    other.persistent(True)
    other.load_state_dict(metric.state_dict())
    other.update(log_probs, target)
    assert other.nll_count == 180


def test_reliability_diagram_is_the_curve_and_draws_it():
    log_probs, target = predictions()
    metric = C.ReliabilityDiagram(num_bins=10)
    metric.update(log_probs, target)
    curve = F.reliability_curve(log_probs, target, num_bins=10)
    edges, confidence, accuracy, count = metric.compute()
    torch.testing.assert_close(
        (edges, confidence, accuracy, count),
        (curve.bin_edges, curve.confidence, curve.accuracy, curve.count),
        equal_nan=True,
    )
    backend = mpl.get_backend(auto_select=False)
    figure, axes = metric.plot()
    assert mpl.get_backend(auto_select=False) == backend
    assert axes.figure is figure
    drawn = axes.lines[-1].get_xydata()
    filled = curve.count > 0
    assert drawn.tolist() == torch.stack([curve.confidence, curve.accuracy], 1)[filled].tolist()
    assert axes.get_xlim() == axes.get_ylim() == (0, 1)
    figure.canvas.draw()
    same_figure, same_axes = metric.plot(axes)
    assert (same_figure, same_axes) == (figure, axes)


def test_plot_without_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    metric = C.ReliabilityDiagram()
    metric.update(*predictions())
    with pytest.raises(ModuleNotFoundError, match=r"bmoe-lightning\[plots\]"):
        metric.plot()
