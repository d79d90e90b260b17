"""The report of a study of routers, from predictions that are made up."""

from __future__ import annotations

import json
import types
from dataclasses import replace

import pytest
import torch

from bmoe_lightning.report import MethodResult, SummarySettings, grid_markdown
from bmoe_lightning.routers.noise_sweep import GAMMAS, Stability
from recipes.common import report_parts
from recipes.paper.outcomes import Outcome, Study
from recipes.routers.methods import read_known
from recipes.routers.presets import PRESETS
from recipes.routers.report import RouterReport, benefit, calibration, shift, stability, write, write_report
from recipes.routers.report.section import _PUBLISHED, _published
from recipes.routers.stored_routes import Counted, Routes

KNOWN = read_known()
LAYERS = ("layers.0", "layers.1", "layers.2", "layers.3")
IDS = tuple(f"fact-{number}" for number in range(60))
SHARPNESS = {
    KNOWN.reference: 5.0,
    "temperature": 1.0,
    "trained_gates": 5.0,
    KNOWN.noise: 1.2,
    "own": 4.0,
    "own_mean": 5.0,
    "own_last": 4.5,
}


def result(method, seed, shift=0.0):
    target = torch.randint(4, (60,), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1 + seed)
    logits = torch.nn.functional.one_hot(target, 4) + torch.randn(60, 4, generator=generator)
    log_probs = (SHARPNESS[method] * (1 - shift) * logits.double()).log_softmax(-1)
    uncertainty = {}
    if method == "own":  # a score that points the wrong way
        uncertainty = {"logit_variance": torch.rand(60, generator=generator, dtype=torch.float64) - 5 * shift}
    return MethodResult(method, f"The {method}", seed, log_probs, target, IDS, uncertainty=uncertainty)


def stable(size):
    indices = {gamma: {layer: 1 - size * gamma * (1 + place) for place, layer in enumerate(LAYERS)} for gamma in GAMMAS}
    return Stability(indices, indices, dict.fromkeys(LAYERS, 0.8), dict.fromkeys(LAYERS, 0.2))


def report_of(preset="small", model="the small model"):
    outcomes = tuple(
        Outcome("home", "experts", name, tuple(result(m, s, shift) for m in SHARPNESS for s in (0, 1, 2)))
        for name, shift in (("home", 0.0), ("away", 0.5))
    )
    labels = {"home": "Home", "away": "Away"}
    study = Study(f"routers, {preset}", model, "home", labels, (), (), outcomes)
    routes = Routes(
        names=(KNOWN.noise, "own"),
        layers=LAYERS,
        susceptible=(2, 3),
        selections={"last": ("last layer", (3,))},
        active_macs=10_000,
        counted={KNOWN.noise: Counted(35, 100, 4), "own": Counted(35, 200, 400)},
        num_questions=50,
    )
    of_rows = {row: {seed: stable(1 + seed) for seed in (0, 1, 2)} for row in (KNOWN.reference, KNOWN.noise)}
    found = RouterReport.of(study, routes, of_rows)
    given = replace(found.given, settings=SummarySettings(num_samples=20))
    return replace(found, given=given)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A report without what the paper's recipe tests, and without figures."""
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "SECTIONS", write.SECTIONS[:6])
        patch.setattr(report_parts, "matplotlib_available", lambda: False)
        patch.setattr(shift, "detection", types.SimpleNamespace(section=lambda _: None))
        write_report(folder, report_of())
    return folder


def table(folder, name):
    return (folder / "tables" / f"{name}.md").read_text()


def test_every_section_is_there(written):
    text = (written / "report.md").read_text()
    titles = [line[3:] for line in text.splitlines() if line.startswith("## ")]
    assert titles == [
        "Calibration in distribution",
        "Do random routers help?",
        "Stability of routes",
        "Distribution shift",
        "Which layers",
        "Cost",
    ]
    assert [make.__module__.rpartition(".")[2] for make in write.SECTIONS[6:]] == ["shift", "write", "write", "write"]
    assert "Susceptible layers: 2, 3 of 4 expert layers" in text
    assert all(f"({letter}) " in text for letter in "abcdef")


def test_a_trained_router_that_does_not_beat_untrained_noise_is_printed_as_such(written):
    text = (written / "report.md").read_text()
    assert "- **The own does not beat untrained noise** (The router_noise) in NLL: +" in text
    assert "**The router_noise does not beat" not in text


def test_one_that_beats_it_is_not(monkeypatch):
    monkeypatch.setitem(SHARPNESS, "own", 1.3)
    monkeypatch.setitem(SHARPNESS, KNOWN.noise, 6.0)
    assert not any("**The own does not beat" in text for text in benefit.section(report_of()).text)


def test_bins_of_the_papers_and_ours(written):
    head = table(written, "calibration").splitlines()
    assert "| ACC ↑ | NLL ↓ | ECE, 10 bins ↓ | MCE, 10 bins ↓ | ECE, 15 bins ↓ | MCE, 15 bins ↓ |" in "\n".join(head)
    assert "The own_last" not in table(written, "calibration")


def test_a_score_that_points_the_wrong_way_is_not_turned_round(written):
    found = json.loads((written / "results.json").read_text())["out_of_distribution"]
    value, low, high = found["own/logit_variance"]["away"]["auroc"]
    assert low <= value <= high < 0.5
    assert found[f"{KNOWN.reference}/entropy"]["away"]["auroc"][0] > 0.5


def test_layers_and_costs(written):
    assert "| last layer (3) |" in table(written, "router_layers")
    assert "| The router_noise | 35 | 1.000 | 35.350 | 4 |" in table(written, "router_operations")


def test_stability_has_the_floor_beside_it(written):
    line = next(line for line in table(written, "stability").splitlines() if "The router_noise" in line)
    assert line.split("|")[2].strip().startswith("0.800")


def test_the_figures_can_be_drawn():
    pytest.importorskip("matplotlib")
    report = report_of()
    for drawn in (*stability.section(report).figures, *shift._figures(report, {"away": report.groups})):
        assert drawn.draw().axes


def test_published_numbers_stand_beside_the_set_up_that_they_are_of():
    granite = PRESETS["granite"].label
    report = report_of("granite", granite)
    assert "full-covariance router [thesis] (published)" in grid_markdown(calibration.section(report).grids[0])
    assert "0.897" in grid_markdown(stability.section(report).grids[0])
    for preset, model in (("small", granite), ("granite", "another/model"), ("granite", f"DRY RUN: {granite}")):
        study = Study(f"routers, {preset}", model, "home", {}, (), (), ())
        assert _published(study, _PUBLISHED) == {}
