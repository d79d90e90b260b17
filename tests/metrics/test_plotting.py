import pytest
import torch

from bmoe_lightning.metrics.binning import BinTotals
from bmoe_lightning.metrics.plotting import draw_reliability_curve, new_axes
from bmoe_lightning.metrics.reliability import curve_from_totals


def curve(number, confidence, correct):
    return curve_from_totals(BinTotals(*(torch.tensor(v, dtype=torch.float64) for v in (number, confidence, correct))))


def test_empty_bins_are_left_out_and_area_follows_the_count():
    _, ax = new_axes()
    draw_reliability_curve(
        ax, curve([0.0, 10.0, 30.0], [0.0, 5.0, 27.0], [0.0, 4.0, 27.0]), color="#123456", linestyle=":", label="x"
    )
    diagonal, line = ax.lines
    assert diagonal.get_xydata().tolist() == [[0, 0], [1, 1]]
    assert line.get_xydata().tolist() == [[0.5, 0.4], [0.9, 0.9]]
    assert (line.get_color(), line.get_linestyle(), line.get_label()) == ("#123456", ":", "x")
    small, large = ax.collections[0].get_sizes() - 10
    assert large == pytest.approx(3 * small)


def test_a_curve_without_any_example_draws_the_diagonal_alone():
    figure, ax = new_axes()
    draw_reliability_curve(ax, curve([0.0, 0.0], [0.0, 0.0], [0.0, 0.0]))
    assert ax.lines[1].get_xydata().size == 0
    figure.canvas.draw()
