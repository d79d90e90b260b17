import sys

import matplotlib as mpl
import pytest
import torch

from bmoe_lightning.metrics.reliability import ReliabilityDiagram, reliability_curve


def test_curve(binary):
    log_probs, target = binary([0.6, 0.62, 0.9], [True, False, True])
    curve = reliability_curve(log_probs, target, num_bins=5)
    torch.testing.assert_close(curve.bin_edges, torch.arange(6) / 5, check_dtype=False)
    assert curve.count.tolist() == [0, 0, 1, 1, 1]
    torch.testing.assert_close(curve.confidence[2:], torch.tensor([0.6, 0.62, 0.9]).double())
    assert curve.accuracy[2:].tolist() == [1, 0, 1]
    assert torch.isnan(curve.accuracy[:2]).all()
    assert torch.isnan(curve.confidence[:2]).all()


@pytest.mark.parametrize(("convention", "count"), [("right", [1, 1]), ("left", [0, 2])])
def test_the_closed_side_of_a_bin(convention, count, binary):
    log_probs, target = binary([0.5, 0.75], [True, False])
    assert reliability_curve(log_probs, target, num_bins=2, convention=convention).count.tolist() == count


@pytest.mark.parametrize("convention", ["right", "left"])
def test_confidence_one_belongs_to_the_last_bin(convention, binary):
    curve = reliability_curve(*binary([1.0, 0.95], [False, True]), convention=convention)
    assert curve.count.tolist() == [0.0] * 14 + [2.0]


def test_the_diagram_is_the_curve_and_draws_it(predictions):
    log_probs, target = predictions()
    metric = ReliabilityDiagram(num_bins=10)
    metric.update(log_probs, target)
    curve = reliability_curve(log_probs, target, num_bins=10)
    torch.testing.assert_close(
        metric.compute(), (curve.bin_edges, curve.confidence, curve.accuracy, curve.count), equal_nan=True
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
    assert metric.plot(axes) == (figure, axes)


def test_plot_without_matplotlib_names_the_extra(monkeypatch, predictions):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    metric = ReliabilityDiagram()
    metric.update(*predictions())
    with pytest.raises(ModuleNotFoundError, match="install the extra plots"):
        metric.plot()


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="num_bins"):
        ReliabilityDiagram(num_bins=0)
