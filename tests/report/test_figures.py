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


def test_every_method_has_a_panel_with_the_others_behind_it(results):
    rows = summarise(results, SETTINGS)
    figure = F.reliability_panels(results, rows)
    styles = method_styles([row.method for row in rows])
    for row, ax in zip(rows, figure.axes, strict=False):
        assert ax.get_title() == f"{row.label}\nECE {row.metrics['ece'].mean:.3f}"
        behind, own = ax.lines[: len(rows)], ax.lines[-1]
        assert {line.get_color() for line in behind} == {"#CCCCCC"}
        assert style_of(own) == styles[row.method]
        assert any(own.get_xydata().tolist() == line.get_xydata().tolist() for line in behind)


def test_the_comparison_has_the_lowest_nll_on_top_and_in_the_title(results):
    rows = summarise(results, SETTINGS)
    figure = F.comparison_figure(rows)
    ordered = sorted(rows, key=lambda row: row.metrics["nll"].mean)
    first = figure.axes[0]
    assert [text.get_text() for text in first.get_yticklabels()] == [row.label for row in ordered]
    assert first.yaxis_inverted()
    assert figure.get_suptitle() == f"Lowest NLL: {ordered[0].label} ({ordered[0].metrics['nll'].mean:.3f})"
    assert first.get_title().startswith("NLL")
    assert len(figure.axes) == len(rows[0].metrics)
    for place, row in enumerate(ordered):
        interval, mean = first.lines[2 * place : 2 * place + 2]
        nll = row.metrics["nll"]
        assert interval.get_xdata().tolist() == pytest.approx([nll.low, nll.high])
        assert mean.get_xdata().tolist() == pytest.approx([nll.mean])


def test_a_method_looks_the_same_in_all_figures_of_a_run(results, monkeypatch, tmp_path):
    drawn, draw = [], F.draw_reliability_curve

    def record(ax, curve, **style):
        drawn.append(MethodStyle(**style))
        draw(ax, curve, **style)

    monkeypatch.setattr(F, "draw_reliability_curve", record)
    rows = summarise(results, SETTINGS)
    F.write_figures(tmp_path, results, rows)
    assert drawn[: len(rows)] == drawn[len(rows) :] == list(method_styles([row.method for row in rows]).values())


def test_the_card_is_as_large_as_tensorboard_shows_it_with_the_best_methods(make_result):
    results = [dataclasses.replace(make_result("map", i), method=f"m{i}", label=f"M {i}", seed=0) for i in range(15)]
    rows = summarise(results, SETTINGS)
    figure = F.comparison_card(rows)
    assert F.figure_image(figure).shape == (3, 218, 440)
    ordered = sorted(rows, key=lambda row: row.metrics["nll"].mean)
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == [row.label for row in ordered[:13]]


def test_any_number_of_methods_can_be_drawn(make_result):
    results = [dataclasses.replace(make_result("map", 0), method=f"m{i}", label=f"M {i}") for i in range(30)]
    rows = summarise(results, SETTINGS)
    figure = F.reliability_panels(results, rows)
    shown = [ax for ax in figure.axes if ax.get_visible()]
    assert len({style_of(ax.lines[-1]) for ax in shown}) == len(shown) == 30
    figure.canvas.draw()
    F.comparison_figure(rows).canvas.draw()


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
        "comparison.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert len(list((tmp_path / "figures").iterdir())) == 5
    assert F.write_figures(tmp_path / "of_all", results, rows, each=False) == [
        tmp_path / "of_all" / name for name in ("reliability.png", "comparison.png")
    ]
    image = F.figure_image(F.reliability_figure(results[:1], rows[0], MethodStyle("#123456", "^")))
    assert image.dtype == torch.uint8
    assert image.shape == (3, 576, 576)
    assert image.float().std() > 1
    assert mpl.get_backend(auto_select=False) == backend


def test_without_matplotlib(monkeypatch, results):
    assert F.matplotlib_available()
    monkeypatch.setattr(F.importlib.util, "find_spec", lambda name: None)
    assert not F.matplotlib_available()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match="install the extra plots"):
        F.reliability_panels(results, summarise(results, SETTINGS))
