"""The row of the model before fine-tuning."""

from __future__ import annotations

import json

import pytest
import torch
from recipe_runs import logits_of, run
from transformers import AutoModelForCausalLM

from bmoe_lightning.report import MethodResult, summarise
from bmoe_lightning.utils.safetensors_io import read_tensor_file
from recipes.common.cli import UsageError
from recipes.qwen_obqa import experiment
from recipes.qwen_obqa.methods import build_methods
from recipes.qwen_obqa.reporting import accuracy_notes
from recipes.qwen_obqa.settings import Settings

METHODS = ("--methods", "map,temperature")


def rows_of(folder):
    return json.loads((folder / "results.json").read_text())["rows"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two seeds with the row."""
    folder = tmp_path_factory.mktemp("zero_shot") / "run"
    assert run(folder, *METHODS, "--zero-shot", "--seeds", "2") == 0
    return folder


def test_the_row_is_the_model_that_training_starts_from(finished):
    stored = read_tensor_file(
        finished / "seed-0" / "predictions" / "zero_shot.safetensors", format="predictions", version=1
    ).tensors["logits"]
    model = AutoModelForCausalLM.from_pretrained(next((finished / "model").glob("random-*")))
    assert torch.equal(stored, logits_of(model, finished))
    row = rows_of(finished)[-1]
    assert (row["label"], row["seeds"]) == ("Zero-shot", [0, 1])
    assert row["warnings"] == []  # how to train longer is of no use for it
    lines = [json.loads(line) for line in (finished / "predictions.jsonl").read_text().splitlines()]
    found = [line["log_probs"] for line in lines if line["method"] == "zero_shot" and line["seed"] == 0]
    assert torch.allclose(torch.tensor(found).double(), stored.log_softmax(-1), atol=1e-6)
    assert (finished / "tensorboard" / "zero_shot").is_dir()
    assert "Zero-shot" in (finished / "results.md").read_text()


def test_seeds_that_share_a_model_share_its_evaluation(finished):
    assert rows_of(finished)[-1]["nll"]["std"] == 0
    assert not (finished / "seed-1" / "predictions" / "zero_shot.safetensors").exists()


def test_it_can_be_added_to_a_finished_run_and_left_out_again(tmp_path, finished, monkeypatch, capsys):
    folder = tmp_path / "run"
    assert run(folder, *METHODS, "--seeds", "2") == 0
    without = rows_of(folder)
    assert [row["method"] for row in without] == ["map", "temperature"]
    assert without == rows_of(finished)[:2]

    def never(*_, **__):
        raise AssertionError("a finished stage was done again")

    monkeypatch.setattr(experiment.SeedRun, "_train_and_fit", never)
    capsys.readouterr()
    assert run(folder, *METHODS, "--seeds", "2", "--zero-shot") == 0
    assert capsys.readouterr().out.count("evaluating") == 1
    assert rows_of(folder) == rows_of(finished)
    assert run(folder, *METHODS, "--seeds", "2") == 0
    assert rows_of(folder) == without


def test_the_default_is_a_row_for_a_given_model_alone():
    assert Settings(model="some/model").resolved().zero_shot
    assert not Settings(model="some/model", zero_shot=False).resolved().zero_shot
    assert not Settings().resolved().zero_shot
    assert Settings(data="folder", zero_shot=True).resolved().zero_shot


def test_a_method_of_its_name_is_refused():
    chosen = {"methods": ({"class_path": "bmoe_lightning.methods.map.MAP", "init_args": {"name": "zero_shot"}},)}
    assert build_methods(Settings(**chosen).resolved())[0].name == "zero_shot"
    with pytest.raises(UsageError, match="zero_shot occurs more than once"):
        build_methods(Settings(**chosen, zero_shot=True).resolved())


@pytest.mark.parametrize(("after", "noted"), [(5, True), (7, False), (8, False)])
def test_a_note_says_that_fine_tuning_has_lowered_the_accuracy(after, noted):
    def result(method, right):
        log_probs = torch.full((10, 2), 0.5).log()
        log_probs[:right, 0], log_probs[right:, 1] = torch.tensor(0.5).log() + 1e-9, torch.tensor(0.5).log() + 1e-9
        log_probs[:right] = torch.tensor([0.6, 0.4]).log()
        log_probs[right:] = torch.tensor([0.4, 0.6]).log()
        target = torch.zeros(10, dtype=torch.int64)
        return MethodResult(method, method, 0, log_probs.double(), target, tuple(map(str, range(10))))

    rows = summarise([result("tuned", after), result("zero_shot", 7)])
    notes = accuracy_notes(rows)
    assert bool(notes) == noted
    assert accuracy_notes(rows[:1]) == []
    if noted:
        assert notes[0].startswith(
            "Fine-tuning has lowered the accuracy on the test items from 0.700 (Zero-shot) to 0.500"
        )
