"""A fitted temperature in the generation_config.json of a model folder."""

from __future__ import annotations

import errno
import json
import shutil

import pytest
import torch
from serving_cases import edit_manifest
from transformers import AutoModelForCausalLM, GenerationConfig

from bmoe_lightning.command import export_temperature as command
from bmoe_lightning.command.main import main
from bmoe_lightning.serving import CalibratedModel

CONFIG = "generation_config.json"


def export(folder, method="temperature", *options):
    return main(["export-temperature", "--run", str(folder), "--method", method, *map(str, options)])


def temperature_of(served, name="temperature"):
    return float(served.fitted.methods[name].state["temperature"])


def test_transformers_generates_with_it_and_the_folder_stays_valid(copied, capsys):
    served = CalibratedModel.from_pretrained(copied)
    expected = temperature_of(served)
    assert export(copied) == 0
    said = capsys.readouterr().out
    assert f"{copied / CONFIG} has the temperature {expected:.4g} of temperature." in said
    assert "held-out questions" in said
    assert "check it on held-out text" in said
    config = GenerationConfig.from_pretrained(copied)
    assert config.temperature == expected
    assert config.do_sample is True
    assert config.calibration["method"] == "temperature"
    assert config.calibration["fit"] == served.fitted.fit_id
    model = AutoModelForCausalLM.from_pretrained(copied)
    assert model.generation_config.temperature == expected
    ids = model.generate(torch.tensor([[3, 4, 5]]), attention_mask=torch.ones(1, 3, dtype=torch.long), max_new_tokens=2)
    assert ids.shape == (1, 5)
    again = CalibratedModel.from_pretrained(copied)  # the manifest has the new digest
    assert again.methods == served.methods
    text = (copied / CONFIG).read_text()
    assert export(copied) == 0
    assert (copied / CONFIG).read_text() == text
    assert export(copied, "shrunk_temperature") == 0
    assert GenerationConfig.from_pretrained(copied).temperature == temperature_of(served, "shrunk_temperature")


def test_other_entries_stay(copied, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(copied / name, model / name)
    before = {"eos_token_id": [1, 2], "top_p": 0.8, "repetition_penalty": 1.05, "of_a_server": {"a": [1]}, "top_k": 0}
    (model / CONFIG).write_text(json.dumps({**before, "temperature": 0.6, "do_sample": False}))
    assert export(copied, "temperature", "--model", model) == 0
    after = json.loads((model / CONFIG).read_text())
    assert {name: after[name] for name in before} == before
    assert after["do_sample"] is True
    assert after["temperature"] == temperature_of(CalibratedModel.from_pretrained(copied))


def test_a_model_without_the_file_gets_one(copied, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(copied / name, model / name)
    assert export(copied, "temperature", "--model", model) == 0
    assert GenerationConfig.from_pretrained(model).do_sample is True


def test_a_model_with_other_weights_is_refused(copied, tmp_path, capsys):
    other = AutoModelForCausalLM.from_pretrained(copied)
    with torch.no_grad():
        other.model.layers[0].mlp.experts.down_proj.mul_(1.01)
    other.save_pretrained(tmp_path / "other")
    before = {path.name for path in (tmp_path / "other").iterdir()}
    assert export(copied, "temperature", "--model", tmp_path / "other") == 1
    assert "fitted to other weights" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "other").iterdir()} == before


def test_a_temperature_of_texts_is_refused(copied, capsys):
    cloze = {"prompt": "cloze", "answer_token_ids": None}
    edit_manifest(copied, lambda content: content["questions"].update(cloze))
    assert export(copied) == 1
    assert "their temperature is none of tokens" in capsys.readouterr().err


def test_a_temperature_of_one_is_written_too(copied, monkeypatch):
    monkeypatch.setattr(command, "temperature_of", lambda *_: 1.0)
    assert export(copied) == 0
    assert json.loads((copied / CONFIG).read_text())["temperature"] == 1.0


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("laplace_temperature", "predicts 'laplace_temperature' with more than a temperature"),
        ("laplace_lpo", "predicts 'laplace_lpo' with more than a temperature"),
        ("map", "predicts 'map' with more than a temperature"),
        ("swag", "predicts 'swag' with more"),
        ("nothing", "has no method 'nothing'"),
    ],
)
def test_methods_with_more_than_a_temperature_are_refused(copied, capsys, method, message):
    before = (copied / CONFIG).read_text()
    assert export(copied, method) == 1
    said = capsys.readouterr().err
    assert message in said
    assert "its methods with one temperature are temperature, shrunk_temperature" in said
    assert (copied / CONFIG).read_text() == before


def test_other_folders_are_refused(copied, tmp_path, capsys):
    assert export(tmp_path / "gone") == 1
    assert f"--run {tmp_path / 'gone'} is not there" in capsys.readouterr().err
    assert export(tmp_path) == 1
    assert "has no calibrated_model.json" in capsys.readouterr().err
    assert export(copied, "temperature", "--model", tmp_path / "gone") == 1
    assert f"error: --model {tmp_path / 'gone'} is no folder; give --model with" in capsys.readouterr().err
    assert export(copied, "temperature", "--model", copied / "bayesian_moe") == 1
    assert "has no config.json; give --model with" in capsys.readouterr().err
    edit_manifest(copied, lambda content: content.update(sha256={}, weights="trained.safetensors"))
    assert export(copied) == 1
    assert "give --model with the folder of the fine-tuned model" in capsys.readouterr().err
    for options in ((), ("--model", tmp_path / "gone")):  # what is wrong whatever the model
        assert export(copied, "nope", *options) == 1
        said = capsys.readouterr().err
        assert "has no method 'nope'; its methods with one temperature are temperature, shrunk_temperature" in said
    edit_manifest(copied, lambda content: content.update(weights=None))
    (copied / CONFIG).write_text("{")
    assert export(copied) == 1
    assert (copied / CONFIG).read_text() == "{"


def test_a_folder_that_cannot_be_written_to_is_named(copied, monkeypatch, capsys):
    def refused(path, text):
        raise PermissionError(errno.EACCES, "Permission denied", str(path.with_name(f".{path.name}.1-2.tmp")))

    monkeypatch.setattr(command, "write_text", refused)
    assert export(copied) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {copied / CONFIG} cannot be written (Permission denied); check the permissions")
    assert ".tmp" not in said


@pytest.mark.parametrize("stop_at", [1, 2, 3])
def test_a_killed_write_leaves_a_folder_that_is_served(copied, monkeypatch, stop_at):
    """After each of the three files that are written, the process ends."""
    count = []

    def counted(write):
        def wrapped(*arguments):
            count.append(1)
            if len(count) == stop_at:
                raise OSError("killed")
            return write(*arguments)

        return wrapped

    monkeypatch.setattr(command, "write_text", counted(command.write_text))
    monkeypatch.setattr(command.Manifest, "write", counted(command.Manifest.write))
    assert export(copied) == 1
    monkeypatch.undo()
    assert CalibratedModel.from_pretrained(copied, methods=["map"]).methods
    GenerationConfig.from_pretrained(copied)
    assert export(copied) == 0
    assert CalibratedModel.from_pretrained(copied, methods=["map"]).methods
