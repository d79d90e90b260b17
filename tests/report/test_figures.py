import sys

import matplotlib as mpl
import pytest
import torch

from bmoe_lightning.metrics import reliability_curve
from bmoe_lightning.report import figures as F
from bmoe_lightning.report.results import SummarySettings, by_method, summarise

SETTINGS = SummarySettings(num_samples=50, num_bins=10)
SLUGS = [
    "map",
    "mc_dropout",
    "checkpoint_ensemble",
    "deep_ensemble",
    "temperature",
    "laplace_evidence",
    "laplace_lpo",
    "evidence_temperature",
    "shrunk_temperature",
    "laplace_temperature",
]


def point(method="map", num_labels=10, mean=1.0):
    return F.LabelBudgetPoint(method, method.upper(), num_labels, mean, mean - 0.1, mean + 0.2)


def test_known_methods_never_share_a_colour_and_others_keep_theirs():
    assert len({F.method_style(slug).color for slug in SLUGS}) == len(SLUGS)
    assert len({F.method_style(slug).marker for slug in SLUGS}) == len(SLUGS)
    assert F.method_style("my_own_method") == F.method_style("my_own_method")


def test_reliability_figure(results):
    row = summarise(results, SETTINGS)[0]
    group = by_method(results)["map"]
    figure = F.reliability_figure(group, row)
    (ax,) = figure.axes
    assert ax.get_xlim() == ax.get_ylim() == (0, 1)
    assert ax.get_aspect() == 1
    assert ax.get_title() == f"MAP\nn = 60 items, 2 seeds, ECE = {row.metrics['ece'].mean:.3f}"
    curve = reliability_curve(
        torch.cat([r.log_probs for r in group]), torch.cat([r.target for r in group]), num_bins=10
    )
    filled = curve.count > 0
    assert ax.lines[1].get_xydata().tolist() == torch.stack([curve.confidence, curve.accuracy], 1)[filled].tolist()


def test_overlay_has_a_line_and_a_legend_entry_a_method(results):
    rows = summarise(results, SETTINGS)
    figure = F.reliability_overlay(results, rows)
    named = {line.get_label(): line for line in figure.axes[0].lines if not line.get_label().startswith("_")}
    assert list(named) == [f"{row.label} (ECE {row.metrics['ece'].mean:.3f})" for row in rows]
    for row, line in zip(rows, named.values(), strict=True):
        assert line.get_color() == F.method_style(row.method).color
    legend = figure.legends[0]
    figure.canvas.draw()
    box = legend.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1
    assert box.y0 >= 0
    assert box.y1 <= figure.axes[0].get_tightbbox().y0


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
    (ax,) = F.label_budget_figure(points).axes
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["0", "10", "100", "all"]
    assert ax.lines[0].get_xdata().tolist() == [0, 1, 2, 3]
    assert ax.lines[1].get_xdata().tolist() == [1, 3]
    assert ax.lines[1].get_color() == F.method_style("temperature").color
    assert len(ax.collections) == 2
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (0.9, 1.2)


def test_label_budget_figure_refuses():
    with pytest.raises(ValueError, match="no points"):
        F.label_budget_figure([])
    with pytest.raises(ValueError, match="map has more than one point"):
        F.label_budget_figure([point(), point()])


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
