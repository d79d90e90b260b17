import dataclasses
import sys

import matplotlib as mpl
import pytest
import torch

from bmoe_lightning.metrics import reliability_curve
from bmoe_lightning.report import figures as F
from bmoe_lightning.report.results import SummarySettings, by_method, summarise
from bmoe_lightning.report.styles import MethodStyle, method_styles

SETTINGS = SummarySettings(num_samples=50, num_bins=10)


def point(method="map", num_labels=10, mean=1.0):
    return F.LabelBudgetPoint(method, method.upper(), num_labels, mean, mean - 0.1, mean + 0.2)


def style_of(line):
    return MethodStyle(line.get_color(), line.get_marker(), line.get_linestyle())


def test_reliability_figure(results):
    row = summarise(results, SETTINGS)[0]
    group = by_method(results)["map"]
    figure = F.reliability_figure(group, row, MethodStyle("#123456", "^", ":"))
    (ax,) = figure.axes
    assert ax.get_xlim() == ax.get_ylim() == (0, 1)
    assert ax.get_aspect() == 1
    assert ax.get_title() == f"MAP\nn = 60 items, 2 seeds, ECE = {row.metrics['ece'].mean:.3f}"
    curve = reliability_curve(
        torch.cat([r.log_probs for r in group]), torch.cat([r.target for r in group]), num_bins=10
    )
    filled = curve.count > 0
    assert style_of(ax.lines[1]) == MethodStyle("#123456", "^", ":")
    assert ax.lines[1].get_xydata().tolist() == torch.stack([curve.confidence, curve.accuracy], 1)[filled].tolist()


def test_overlay_has_a_line_and_a_legend_entry_a_method(results):
    rows = summarise(results, SETTINGS)
    figure = F.reliability_overlay(results, rows)
    named = {line.get_label(): line for line in figure.axes[0].lines if not line.get_label().startswith("_")}
    assert list(named) == [f"{row.label} (ECE {row.metrics['ece'].mean:.3f})" for row in rows]
    assert [style_of(line) for line in named.values()] == list(method_styles([row.method for row in rows]).values())
    legend = figure.legends[0]
    figure.canvas.draw()
    box = legend.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1
    assert box.y0 >= 0
    assert box.y1 <= figure.axes[0].get_tightbbox().y0


def test_a_method_looks_the_same_in_all_figures_of_a_run(results, monkeypatch, tmp_path):
    drawn, draw = [], F.draw_reliability_curve

    def record(ax, curve, *, label=None, **style):
        drawn.append(MethodStyle(**style))
        draw(ax, curve, label=label, **style)

    monkeypatch.setattr(F, "draw_reliability_curve", record)
    rows = summarise(results, SETTINGS)
    F.write_figures(tmp_path, results, rows)
    assert drawn[: len(rows)] == drawn[len(rows) :] == list(method_styles([row.method for row in rows]).values())


def test_any_number_of_methods_can_be_drawn(make_result):
    results = [dataclasses.replace(make_result("map", 0), method=f"m{i}", label=f"M {i}") for i in range(30)]
    figure = F.reliability_overlay(results, summarise(results, SETTINGS))
    lines = [line for line in figure.axes[0].lines if line.get_label().startswith("M ")]
    assert len({style_of(line) for line in lines}) == 30
    figure.canvas.draw()
    assert figure.legends[0].get_window_extent().y1 <= figure.axes[0].get_tightbbox().y0


def test_well_filled_leaves_out_small_bins_only():
    confidence = torch.tensor([0.55] + [0.95] * 99, dtype=torch.float64)
    log_probs = torch.stack([confidence, 1 - confidence], 1).log()
    curve = reliability_curve(log_probs, torch.zeros(100, dtype=torch.long), num_bins=10)
    kept = F.well_filled(curve)
    assert curve.count[5] == 1
    assert kept.count.tolist() == [0.0] * 9 + [99.0]
    assert torch.isnan(kept.accuracy[5])
    assert kept.accuracy[9] == 1


def test_label_budget_figure_orders_budgets_with_all_last():
    points = [point("map", n) for n in (None, 100, 0, 10)] + [point("temperature", n, 0.5) for n in (10, None)]
    methods = ["map", "other", "temperature"]
    (ax,) = F.label_budget_figure(points, methods).axes
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["0", "10", "100", "all"]
    assert ax.lines[0].get_xdata().tolist() == [0, 1, 2, 3]
    assert ax.lines[1].get_xdata().tolist() == [1, 3]
    assert style_of(ax.lines[1]) == method_styles(methods)["temperature"]
    assert len(ax.collections) == 2
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (0.9, 1.2)


def test_label_budget_figure_refuses():
    with pytest.raises(ValueError, match="no points"):
        F.label_budget_figure([], ["map"])
    with pytest.raises(ValueError, match="map has more than one point"):
        F.label_budget_figure([point(), point()], ["map"])
    with pytest.raises(ValueError, match=r"the points are of \['map'\], but the methods of the run are \['other'\]"):
        F.label_budget_figure([point()], ["other"])


def test_image_and_files(results, tmp_path):
    rows = summarise(results, SETTINGS)
    backend = mpl.get_backend(auto_select=False)
    paths = F.write_figures(tmp_path / "figures", results, rows)
    assert [path.name for path in paths] == [
        "reliability_map.png",
        "reliability_temperature.png",
        "reliability_laplace_evidence.png",
        "reliability.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert len(list((tmp_path / "figures").iterdir())) == 4
    image = F.figure_image(F.reliability_overlay(results, rows))
    assert image.dtype == torch.uint8
    assert image.shape == (3, 696, 624)
    assert image.float().std() > 1
    assert mpl.get_backend(auto_select=False) == backend


def test_without_matplotlib(monkeypatch, results):
    assert F.matplotlib_available()
    monkeypatch.setattr(F.importlib.util, "find_spec", lambda name: None)
    assert not F.matplotlib_available()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"bmoe-lightning\[plots\]"):
        F.reliability_overlay(results, summarise(results, SETTINGS))
