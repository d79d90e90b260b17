"""Figures of random routers, by what they draw."""

from __future__ import annotations

import pytest
import torch

from bmoe_lightning.report import score_figure, stability_figure

pytest.importorskip("matplotlib")
CURVES = {gamma: {"first": 1 - gamma, "second": 1 - 2 * gamma, "third": 1 - 3 * gamma} for gamma in (0.0, 0.01, 0.1)}
FLOOR = {"first": 1.0, "second": 0.9, "third": 0.8}


def test_a_panel_for_each_method_and_a_line_for_each_layer():
    figure = stability_figure(dict.fromkeys(("one", "two", "three", "four"), (CURVES, FLOOR)))
    shown = [ax for ax in figure.axes if ax.get_visible()]
    assert [ax.get_title() for ax in shown] == ["one", "two", "three", "four"]
    lines = shown[0].get_lines()
    assert lines[2].get_ydata().tolist() == [1 - 0.02, 1 - 0.2]
    assert lines[3].get_ydata() == [0.9, 0.9]
    assert [text.get_text() for text in shown[0].get_legend().get_texts()] == ["first layer", "last layer"]


def test_scores_of_all_data_sets_share_their_bins():
    scores = {"entropy": {"inside": torch.rand(50), "outside": 1 + torch.rand(40)}, "still": {"inside": torch.ones(3)}}
    figure = score_figure(scores)
    first, second = figure.axes
    assert [text.get_text() for text in first.get_legend().get_texts()] == ["inside", "outside"]
    edges = [patch.get_xy()[:, 0] for patch in first.patches]
    assert edges[0].min() == pytest.approx(edges[1].min())
    assert edges[0].max() == pytest.approx(float(scores["entropy"]["outside"].max()))
    assert second.get_xlabel() == "still"
