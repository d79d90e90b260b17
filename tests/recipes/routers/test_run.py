"""The command, on a model with random weights."""

from __future__ import annotations

import json
import shutil

import pytest

from recipes.qwen_obqa.seed_run import SeedRun
from recipes.routers import run, worker
from recipes.routers.__main__ import main
from recipes.routers.measures import MEASURES

pytestmark = pytest.mark.slow

DRY = ("--dry-run", "--quiet", "--accelerator", "cpu", "--seeds", "1", "--methods", "router_noise")


def make(folder, *arguments):
    return main([*DRY, "--output-dir", str(folder), *arguments])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("routers") / "study"
    assert make(folder, "--stability-questions", "4") == 0
    return folder


def test_the_report_has_every_table(finished):
    text = (finished / "report" / "report.md").read_text()
    assert "DRY RUN, the numbers mean nothing" in text.splitlines()[0]
    for name in ("calibration", "stability", "router_layers", "router_operations", "costs"):
        assert (finished / "report" / "tables" / f"{name}.tex").is_file()
    found = json.loads((finished / "report" / "results.json").read_text())
    assert len(found["layers"]) == 3
    assert len(found["susceptible_layers"]) == 1
    assert (finished / MEASURES / "seed-0" / "calibration" / "map.json").is_file()  # which chose them
    assert "trained_gates/gate_entropy" in found["out_of_distribution"]
    assert list((finished / "tensorboard").glob("*"))
    (hashes,) = found["hashes"].values()
    assert "test of judged" in hashes["data"]
    assert "router_noise" in hashes["seeds"]["0"]["methods"]
    assert found["versions"]["torch"] in text


def test_a_finished_study_is_not_repeated(finished, tmp_path, monkeypatch):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    monkeypatch.setattr(SeedRun, "_train_and_fit", lambda *_: pytest.fail("a run is made again"))
    monkeypatch.setattr(SeedRun, "with_trained", lambda *_: pytest.fail("something is measured again"))
    before = (folder / "report" / "report.md").read_bytes()
    assert make(folder, "--stability-questions", "4") == 0
    assert (folder / "report" / "report.md").read_bytes() == before


def test_a_lost_measurement_alone_is_made_again(finished, tmp_path, monkeypatch):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    (lost,) = (folder / MEASURES).glob("*/router_noise.json")
    before = lost.read_bytes()
    lost.unlink()
    monkeypatch.setattr(SeedRun, "_train_and_fit", lambda *_: pytest.fail("a run is made again"))
    monkeypatch.setattr(run, "outstanding_costs", lambda *_: [])
    assert make(folder, "--stability-questions", "4") == 0
    assert lost.read_bytes() == before


def test_the_report_needs_no_model(finished, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "model")
    shutil.rmtree(folder / "report")
    for weights in folder.rglob("trained.safetensors"):
        weights.unlink()
    assert main(["--report", str(folder)]) == 0
    assert (folder / "report" / "report.md").read_text() in capsys.readouterr().out


def test_steps_of_seeds_are_jobs_in_order(tmp_path, monkeypatch):
    """Each is done in this process, in place of one of its own."""
    told = []

    def done_here(jobs, at_a_time):
        assert at_a_time == 2
        for job in jobs:
            told.append((job.name, job.after))
            assert worker.main(job.arguments[2]) == 0

    monkeypatch.setattr(run, "run_jobs", done_here)
    monkeypatch.setattr(run, "outstanding_costs", lambda *_: [])
    folder = tmp_path / "study"
    assert make(folder, "--stability-questions", "2", "--seeds", "2", "--jobs", "2") == 0
    assert [name for name, _ in told[::2]] == [
        f"seed 0, {what}"
        for what in (
            "pre-training",
            "fine-tuning and fits",
            "distribution shift and stability",
            "routers of some layers",
        )
    ]
    assert [after for _, after in told[3:6]] == ["seed 1, pre-training", "seed 0, fine-tuning and fits",
                                                 "seed 1, fine-tuning and fits"]  # fmt: skip
    assert {path.name for path in (folder / "runs").iterdir()} == {"recall-experts-0", "recall-experts-1"}
    assert (folder / MEASURES / "seed-1" / "router_noise.json").is_file()
