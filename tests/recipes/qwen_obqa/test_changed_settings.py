"""What a run does again in its folder when a setting has changed: nothing but what depends on it."""

from __future__ import annotations

import pytest
import torch
from recipe_runs import run

from bmoe_lightning.utils.safetensors_io import read_tensor_file
from recipes.qwen_obqa import experiment, seed_run

METHODS = "map,temperature,laplace_lpo,mc_dropout"
BASE = ("--methods", METHODS, "--limit-validation", "128", "--limit-test", "12", "--eval-batch-size", "8")


@pytest.fixture(scope="module", autouse=True)
def no_report():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "report", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished run, which every test leaves with the same settings."""
    folder = tmp_path_factory.mktemp("changed") / "run"
    assert run(folder, *BASE) == 0
    return folder


def done_again(folder, capsys, *flags):
    """The stages that a command does, by what it says."""
    capsys.readouterr()
    assert run(folder, *flags) == 0
    lines = [line.removeprefix("[seed 0] ") for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    return [line for line in lines if not line.startswith("pre-trained")]


def predictions(folder, name):
    return read_tensor_file(folder / "seed-0" / "predictions" / f"{name}.safetensors", format="predictions", version=1)


@pytest.mark.parametrize("methods", ["mc_dropout,laplace_lpo,temperature,map", "temperature,map", "map"])
def test_order_and_fewer_methods_do_nothing(folder, capsys, methods):
    assert done_again(folder, capsys, *BASE, "--methods", methods) == []


@pytest.mark.parametrize(
    "changed", ["laplace_lpo.link=probit", "laplace_lpo.num_samples=7", "mc_dropout.num_samples=3", "mc_dropout.p=.3"]
)
def test_an_option_of_prediction_evaluates_one_method(folder, capsys, changed):
    method = changed.partition(".")[0]
    assert done_again(folder, capsys, *BASE, "--set", changed) == [f"evaluating {method}"]
    assert done_again(folder, capsys, *BASE) == [f"evaluating {method}"]


@pytest.mark.parametrize("lost", [False, True])
def test_a_fit_that_is_damaged_beside_its_predictions_is_made_again(folder, capsys, lost):
    index = folder / "seed-0" / "bayesian_moe" / "index.json"
    before = {name: predictions(folder, name).tensors["log_probs"] for name in METHODS.split(",")}
    if lost:
        index.unlink()
    else:
        index.write_text(index.read_text()[:100])
    fitting, evaluating = done_again(folder, capsys, *BASE)
    assert fitting == f"fitting {METHODS.replace(',', ', ')} to the fine-tuned weights"
    assert evaluating == "evaluating"
    assert all(torch.equal(predictions(folder, name).tensors["log_probs"], value) for name, value in before.items())
    assert done_again(folder, capsys, *BASE) == []


def test_a_label_does_nothing(folder, capsys):
    assert done_again(folder, capsys, *BASE, "--set", "map.label=Plain") == []


def test_another_limit_of_the_test_split_evaluates(folder, capsys):
    fitted = {path: path.stat().st_mtime_ns for path in (folder / "seed-0" / "bayesian_moe").rglob("*")}
    for limit in (5, 12):
        assert done_again(folder, capsys, *BASE, "--limit-test", str(limit)) == ["evaluating"]
        assert len(predictions(folder, "map").tensors["labels"]) == limit
        assert done_again(folder, capsys, *BASE, "--limit-test", str(limit)) == []
    assert {path: path.stat().st_mtime_ns for path in (folder / "seed-0" / "bayesian_moe").rglob("*")} == fitted


def test_a_smaller_batch_of_the_evaluation_resumes(tmp_path, capsys, monkeypatch):
    """As after a lack of memory in the evaluation."""
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:

        def lacking(*_, **__):
            raise MemoryError

        patch.setattr(seed_run.StoredPredictions, "write", lacking)
        assert run(folder, *BASE) == 1
        assert "error: there is not enough memory; use smaller batches" in capsys.readouterr().err
    assert done_again(folder, capsys, *BASE, "--eval-batch-size", "2") == ["evaluating"]
    assert done_again(folder, capsys, *BASE) == []


@pytest.mark.parametrize(
    "flags", [("--limit-validation", "120"), ("--epochs", "3"), ("--limit-train", "8"), ("--precision", "bf16-true")]
)
def test_what_trained_weights_depend_on_is_refused(folder, capsys, flags):
    assert run(folder, *BASE, *flags) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert done_again(folder, capsys, *BASE) == []
