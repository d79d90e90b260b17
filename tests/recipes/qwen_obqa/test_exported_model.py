"""The fine-tuned model as a folder that transformers loads."""

from __future__ import annotations

import json
import os
import uuid

import pytest
import torch
from recipe_runs import logits_of, run
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from bmoe_lightning.utils.new_folder import UNFINISHED
from bmoe_lightning.utils.safetensors_io import read_tensor_file
from recipes.qwen_obqa import experiment, exported_model, seed_run


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr(experiment, "report", lambda *_: None)


METHODS = ("--methods", "map,temperature")


def test_loaded_it_has_the_logits_of_the_run(tmp_path):
    for precision in ("32-true", "bf16-true"):
        folder, saved = tmp_path / precision, tmp_path / f"saved-{precision}"
        assert (
            run(folder, *METHODS, "--precision", precision, "--save-model", str(saved), "--learning-rate", ".01") == 0
        )
        model = AutoModelForCausalLM.from_pretrained(saved)
        assert model.dtype == {"32-true": torch.float32, "bf16-true": torch.bfloat16}[precision]
        stored = folder / "seed-0" / "predictions" / "map.safetensors"
        expected = read_tensor_file(stored, format="predictions", version=1).tensors["logits"]
        assert torch.equal(logits_of(model, folder, precision=precision, learning_rate=0.01), expected)
        start = next((folder / "model").glob("random-*"))
        before = AutoModelForCausalLM.from_pretrained(start, dtype=model.dtype)
        assert not torch.allclose(logits_of(before, folder, precision=precision), expected, atol=0.05)
        tokenizers = [AutoTokenizer.from_pretrained(place) for place in (saved, start)]
        assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
        names = [names_of(place) for place in (saved, start)]
        assert names[0] == names[1]
        assert saved.stat().st_mode & 0o777 == folder.stat().st_mode & 0o777
        assert not list(tmp_path.glob(f"{UNFINISHED}*"))


def names_of(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


def test_a_finished_run_is_saved_later_and_once(tmp_path, monkeypatch, capsys):
    folder, saved = tmp_path / "run", tmp_path / "some" / "saved"
    assert run(folder, *METHODS, "--seeds", "2") == 0
    flags = [*METHODS, "--seeds", "2", "--save-model", str(saved)]
    capsys.readouterr()
    checked = []
    monkeypatch.setattr(seed_run, "check_pretrained", lambda output, seed, weights: checked.append(seed))
    assert run(folder, *flags) == 0
    shown = capsys.readouterr().out
    assert "fine-tuning" not in shown
    assert checked == [0, 1]
    assert shown.count("saving the fine-tuned model") == 2
    weights = [json.loads((saved / f"seed-{seed}" / "fine_tuning.json").read_text())["weights"] for seed in (0, 1)]
    assert weights[0] != weights[1]

    def never(*_, **__):
        raise AssertionError("it was written again")

    monkeypatch.setattr(exported_model, "save_model", never)
    assert run(folder, *flags) == 0
    assert checked == [0, 1]

    config = saved / "seed-1" / "config.json"
    config.write_text(config.read_text() + " ")
    assert run(folder, *flags) == 1
    assert f"{config} is damaged; remove {config.parent}" in capsys.readouterr().err


def test_what_a_killed_process_left_is_removed(tmp_path):
    folder, saved = tmp_path / "run", tmp_path / "saved[1]"
    left = tmp_path / f"{UNFINISHED}saved[1]-{uuid.uuid4().hex}"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    of_others = [
        tmp_path / f"{UNFINISHED}{name}{uuid.uuid4().hex}" for name in ("other-", "saved[1]-large-", "saved1-")
    ]
    for other in of_others:
        other.mkdir()
    saved.mkdir()  # an empty folder may be there
    assert run(folder, *METHODS, "--save-model", str(saved)) == 0
    assert (saved / "config.json").is_file()
    assert not left.exists()
    assert all(other.is_dir() for other in of_others)


def refused(capsys, folder, saved):
    assert run(folder, *METHODS, "--save-model", str(saved)) == 1
    captured = capsys.readouterr()
    assert "fine-tuning the experts" not in captured.out
    assert len(captured.err.splitlines()) == 1
    return captured.err


def test_other_content_is_refused_before_training(tmp_path, capsys):
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "thesis.tex").write_text("mine")
    assert f"--save-model {saved} has other content" in refused(capsys, tmp_path / "run", saved)
    assert [path.name for path in saved.iterdir()] == ["thesis.tex"]
    assert "has other content" in refused(capsys, tmp_path / "run", saved / "thesis.tex")


def test_the_model_of_another_run_is_refused(tmp_path, capsys):
    saved, one = tmp_path / "saved", tmp_path / "one"
    assert run(one, *METHODS, "--save-model", str(saved)) == 0
    capsys.readouterr()
    assert "has other content" in refused(capsys, tmp_path / "two", saved)
    assert run(tmp_path / "three", *METHODS, "--learning-rate", ".01") == 0
    assert run(tmp_path / "three", *METHODS, "--learning-rate", ".01", "--save-model", str(saved)) == 1
    assert "has another model than this run's" in capsys.readouterr().err
    assert run(one, *METHODS, "--save-model", str(saved), "--overwrite") == 1
    assert "has other content" in capsys.readouterr().err


def test_the_model_of_another_run_is_refused_before_a_killed_one_trains(tmp_path, monkeypatch, capsys):
    saved, of_other = tmp_path / "saved", tmp_path / "other"
    assert run(of_other, *METHODS, "--learning-rate", ".01", "--save-model", str(saved)) == 0

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(experiment.SeedRun, "complete", killed)
        assert run(tmp_path / "run", *METHODS) == 130
    capsys.readouterr()
    assert "has another model than this run's" in refused(capsys, tmp_path / "run", saved)
    # The run that wrote it trains again what is damaged.
    (of_other / "seed-0" / "trained.safetensors").write_bytes(b"")
    assert run(of_other, *METHODS, "--learning-rate", ".01", "--save-model", str(saved)) == 0


@pytest.mark.parametrize("place", ["run", "run/model/mine", "."])
def test_folders_in_one_another_are_refused(tmp_path, capsys, place):
    message = refused(capsys, tmp_path / "run", tmp_path / place)
    assert "must be neither inside nor around --output-dir" in message


def test_what_cannot_be_written_is_refused_before_training(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "cannot be written (File exists)" in refused(capsys, tmp_path / "run", tmp_path / "file" / "saved")
    if os.geteuid():
        closed = tmp_path / "closed"
        closed.mkdir(mode=0o500)
        assert "cannot be written (Permission denied)" in refused(capsys, tmp_path / "run", closed / "saved")
