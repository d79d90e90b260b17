"""Costs of predictions where they are served, at a tiny size."""

from __future__ import annotations

import pytest
import torch

from recipes.benchmark import serving
from recipes.benchmark.__main__ import main
from recipes.benchmark.serving import measure_serving
from recipes.benchmark.serving_table import serving_table
from recipes.benchmark.settings import SECTIONS
from recipes.benchmark.workload import PRESETS, Workload

NAMES = ("map", "temperature", "laplace_lpo", "checkpoint_ensemble", "laplace_mixture", "router_noise", "bayesian_lora")


@pytest.fixture(scope="module")
def measured():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serving, "method_names", lambda: NAMES)
        work = Workload(PRESETS["tiny"].serving, torch.device("cpu"))
        before = {name: value.clone() for name, value in work.model.state_dict().items()}
        section = measure_serving(work, repeats=1)
        assert all(torch.equal(value, before[name]) for name, value in work.model.state_dict().items())
        assert not any(parameter.requires_grad for parameter in work.model.parameters())
    return section


def test_every_method_has_its_time_and_memory_at_both_batch_sizes(measured):
    labels = [
        *("MAP", "Temperature scaling", "Bayesian-MoE (LPO)", "Checkpoint ensemble", "Router noise"),
        *("Mixture of Laplace posteriors", "Bayesian-MoE (LPO), last quarter of layers"),
    ]
    names = {ratio.name for ratio in measured.ratios}
    weighed = {amount.name for amount in measured.amounts}
    for label in labels:
        assert {f"{label} / plain forward, batch of {size}" for size in (1, 32)} <= names
        assert {f"{label}, batch of {size}, beyond that" for size in (1, 32)} <= weighed
    assert "fixed part of a linearised prediction / plain forward, batch of 1" in names
    assert "bayesian_lora" in measured.notes[1]


def test_bars_are_those_of_plain_forward_passes(measured):
    bars = {ratio.name: ratio.bar for ratio in measured.ratios}
    assert bars["Temperature scaling / plain forward, batch of 32"] == 1.02
    assert bars["Checkpoint ensemble / plain forward, batch of 32"] is None


def test_it_runs_if_it_is_named():
    assert "serving" not in SECTIONS


def test_the_short_table_has_a_row_for_each_method(measured):
    text = serving_table(measured, {"torch": "2.0", "threads": "1"})
    rows = [line for line in text.split("\n") if line.startswith("| ")]
    (temperature,) = [row for row in rows if row.startswith("| Temperature scaling |")]
    assert temperature.count(" MB |") == 2
    assert len([row for row in rows if row.count("|") == 6]) == 1 + 1 + 7  # head, rule and methods
    assert any(row.startswith("| fixed part of a linearised prediction / plain forward, batch of 1 |") for row in rows)
    assert any(row.startswith("| one question of 32 tokens: one backward pass on copies / ") for row in rows)
    assert "Measured with torch 2.0, threads 1." in text.replace("\n", " ")
    assert all(len(line) <= 120 for line in text.split("\n") if not line.startswith("|"))


def test_a_table_that_is_not_measured_is_not_written(tmp_path, capsys):
    page = tmp_path / "serving.md"
    assert main(["--model-shape", "tiny", "--only", "prediction", "--write", str(page)]) == 2
    assert "--write writes the table of serving, which is not measured; add --only serving" in capsys.readouterr().err
