"""The command, on a model with random weights."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch

from bmoe_lightning.report import SummarySettings
from recipes.common import report_parts
from recipes.paper import run
from recipes.paper.__main__ import main
from recipes.paper.report import write
from recipes.paper.stored_study import STUDY_FILE, read_study
from recipes.qwen_obqa.seed_run import SeedRun

pytestmark = pytest.mark.slow


DRY = ("--dry-run", "--quiet", "--accelerator", "cpu", "--seeds", "1")


def make(folder, *arguments, jobs=1):
    return main([*DRY, "--jobs", str(jobs), "--output-dir", str(folder), *arguments])


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch):
    """Costs are measured once, in the study that most tests share."""
    monkeypatch.setattr(run, "outstanding_costs", lambda *_: [])


@pytest.fixture(scope="module", autouse=True)
def quick_reports():
    """Without figures, and with few resamples: what a report has is tested on studies without a model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_parts, "matplotlib_available", lambda: False)
        patch.setattr(write, "SummarySettings", partial(SummarySettings, num_samples=20))
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("paper") / "study"
    assert make(folder, "--table", "3,5") == 0
    return folder


def test_the_study_has_every_outcome(finished):
    study = read_study(finished)
    tested = {(o.trained_on, o.mode, o.tested_on) for o in study.outcomes}
    assert tested == {("recall", mode, other) for mode in ("experts", "lora") for other in study.labels}
    judged = {result.method: result for result in study.results("recall", "judged")}
    assert judged["map"].log_probs.shape == (8, 2)
    assert "laplace_lpo_without_3" in judged
    assert [result.method for result in study.results("recall", "judged", "lora")] == ["map", "bayesian_lora"]


def test_a_finished_study_is_not_repeated_and_another_table_adds_its_runs(finished, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "copy"  # the report of another table is without the rows of these
    shutil.copytree(finished, folder)
    trained, train = [], SeedRun._train_and_fit

    def recorded(self, *args):
        trained.append(self.output.name)
        train(self, *args)

    monkeypatch.setattr(SeedRun, "_train_and_fit", recorded)
    before = read_study(folder)
    assert make(folder, "--table", "3,5") == 0
    assert trained == []
    for one, other in zip(before.outcomes, read_study(folder).outcomes, strict=True):
        assert all(torch.equal(a.log_probs, b.log_probs) for a, b in zip(one.results, other.results, strict=True))
    capsys.readouterr()
    assert make(folder, "--table", "6") == 0
    assert set(trained) == {f"{name}-experts" for name in before.labels if name != "recall"}


def test_the_model_before_fine_tuning_is_a_row_that_needs_no_training(finished, tmp_path, monkeypatch):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    monkeypatch.setattr(SeedRun, "_train_and_fit", lambda *_: pytest.fail("a run is made again"))
    assert make(folder, "--table", "3,5", "--zero-shot") == 0
    results = {result.method: result for result in read_study(folder).results("recall", "recall")}
    before, after = results["zero_shot"], results["map"]
    assert (before.ids, before.seed, before.label) == (after.ids, 0, "Zero-shot")
    assert not torch.allclose(before.log_probs, after.log_probs)
    assert "| Zero-shot |" in (folder / "report" / "tables" / "all_metrics_recall_recall.md").read_text()


def test_the_report_needs_no_model(finished, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "model")
    for weights in folder.rglob("trained.safetensors"):
        weights.unlink()
    shutil.rmtree(folder / "report")
    assert main(["--report", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert (folder / "report" / "report.md").read_text() in printed
    assert "DRY RUN, the numbers mean nothing" in printed.splitlines()[0]
    costs = (folder / "report" / "tables" / "costs.md").read_text()
    assert all(label in costs for label in ("MAP (LoRA)", "Bayesian-LoRA", "Deep ensemble"))
    assert "without part" not in costs
    found = json.loads((folder / "report" / "results.json").read_text())
    assert found["attribution"]["method"] == "laplace_lpo"
    assert found["versions"]["torch"] in (folder / "report" / "report.md").read_text()
    assert found["hashes"].keys() == {"recall-experts", "recall-lora"}
    of_experts = found["hashes"]["recall-experts"]
    assert {"train", "calibration", "test", "test of judged"} <= of_experts["data"].keys()
    digests = of_experts["seeds"]["0"]
    assert digests["trained_weights"]
    assert digests["posteriors"]
    assert "laplace_lpo" in digests["methods"]
    assert "| 0 |" in (folder / "report" / "tables" / "attribution.md").read_text()


def test_a_damaged_index_is_named(finished, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    path = folder / STUDY_FILE
    path.write_text(path.read_text().replace('"recall"', '"recal"', 1))
    assert main(["--report", str(folder)]) == 1
    assert STUDY_FILE in capsys.readouterr().err


def test_runs_in_processes_are_the_same_and_a_signal_stops_them_all(finished, tmp_path):
    folder = tmp_path / "study"
    command = [
        sys.executable,
        "-m",
        "recipes.paper",
        *DRY,
        "--jobs",
        "2",
        "--output-dir",
        str(folder),
        "--table",
        "3,5",
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (folder / "runs" / "recall-experts" / "run.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM" in errors
    assert make(folder, "--table", "3,5", jobs=2) == 0
    assert make(finished, "--table", "3,5") == 0  # after what other tests have asked for
    one, other = read_study(finished), read_study(folder)
    for first, second in zip(one.outcomes, other.outcomes, strict=True):
        for a, b in zip(first.results, second.results, strict=True):
            assert a.method == b.method
            torch.testing.assert_close(a.log_probs, b.log_probs, rtol=1e-4, atol=1e-4)  # other numbers of threads


def test_data_that_cannot_be_loaded_are_named(tmp_path, capsys):
    assert make(tmp_path / "study", "--table", "3", "--data", f"mine={tmp_path / 'nothing'}", jobs=2) == 1
    assert "nothing" in capsys.readouterr().err


def test_what_no_run_could_do_is_refused_before_the_first(tmp_path, capsys):
    assert make(tmp_path / "study", "--table", "1", "--epochs", "1", jobs=2) == 2
    assert "checkpoint_ensemble needs the weights after at least 2 epochs" in capsys.readouterr().err
    assert not (tmp_path / "study" / "runs").exists()


def test_runs_that_processes_have_replaced_are_not_made_again(finished, tmp_path, monkeypatch):
    folder = tmp_path / "study"
    shutil.copytree(finished, folder)
    before = (folder / "runs" / "recall-lora" / "seed-0" / "trained.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(SeedRun, "_train_and_fit", lambda *_: pytest.fail("a run is made again in this process"))
    assert make(folder, "--table", "3", "--overwrite", jobs=2) == 0
    assert (folder / "runs" / "recall-lora" / "seed-0" / "trained.safetensors").stat().st_mtime_ns > before


def test_a_measurement_that_fails_leaves_a_report(finished, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "report")

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "outstanding_costs", lambda *_: [("experts", "map")])
    monkeypatch.setattr(run, "measure_costs", fail)
    with contextlib.suppress(KeyboardInterrupt):
        make(folder, "--table", "3,5")
    assert (folder / "report" / "report.md").is_file()
    assert f"The report is in {folder / 'report' / 'report.md'}" in capsys.readouterr().out
