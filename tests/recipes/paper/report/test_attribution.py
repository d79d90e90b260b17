"""The part of the report on where the variance comes from."""

from __future__ import annotations

import json

import pytest
import torch

from bmoe_lightning.laplace import LayerAttribution
from recipes.common import report_parts
from recipes.paper.report import Attributed, attribution, write, write_report

LAYERS = (
    LayerAttribution(
        "a", 0, torch.tensor([[0.2, 0.0, 0.4], [0.6, 0.0, 0.0]]).double(), torch.tensor([[3, 0, 2], [5, 0, 0]])
    ),
    LayerAttribution("b", 2, torch.tensor([[0.1, 0.1], [0.3, 0.3]]).double(), torch.tensor([[1, 4], [2, 3]])),
)
FOUND = Attributed("laplace_lpo", 3, LAYERS)
METHODS = {"map": ("MAP", 3.0), "laplace_lpo": ("Bayesian-MoE (LPO)", 1.1)}


def test_a_row_for_each_layer(study, report_of):
    section = attribution.section(report_of(study, attribution=FOUND))
    (grid,), (figure,) = section.grids, section.figures
    rows = {row.key: [cell.mean for cell in row.cells] for row in grid.blocks[0].rows}
    # Means over both examples: .4 and .2 of layer 0, .2 and .2 of layer 2.
    assert rows == {
        "0": [pytest.approx(0.6), pytest.approx(0.4), 2, 10],
        "2": [pytest.approx(0.4), pytest.approx(0.2), 2, 10],
    }
    assert grid.caption == (
        "A small model, trained and tested on Home, seed 3: parts of the variance under Bayesian-MoE (LPO), by layer."
    )
    assert figure.caption.startswith(grid.caption.removesuffix("."))
    assert [ax.get_title() for ax in figure.draw().get_axes() if ax.images][1] == "routed tokens"


def test_the_numbers_are_in_json_and_a_study_without_them_says_so(make_study, tmp_path, monkeypatch):
    monkeypatch.setattr(write, "SECTIONS", [attribution.section])
    monkeypatch.setattr(report_parts, "matplotlib_available", lambda: False)
    study = make_study(METHODS, seeds=(0,), lora={}, labels={"home": "Home"})
    write_report(tmp_path, study, attribution=FOUND)
    found = json.loads((tmp_path / "results.json").read_text())["attribution"]
    assert (found["method"], found["seed"], found["layers"]) == ("laplace_lpo", 3, [0, 2])
    assert found["slots"] == [[8, 0, 2], [3, 7, None]]
    assert found["variance"][1][2] is None
    assert "| 0 | 60.0 |" in (tmp_path / "tables" / "attribution.md").read_text()
    text = write_report(tmp_path, study)[0].read_text()
    assert "## Where the uncertainty comes from\n\nNot made. Run the command that made the study again" in text
    assert not (tmp_path / "tables" / "attribution.md").exists()


def test_a_study_without_the_method_has_no_such_part(make_study, report_of):
    study = make_study({"map": ("MAP", 3.0)}, seeds=(0,), lora={})
    assert attribution.section(report_of(study)) is None
