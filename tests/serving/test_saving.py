"""A folder that holds all of a served model."""

from __future__ import annotations

import shutil

import pytest
import torch
from finetuner_cases import TEST, qwen, trainer
from serving_cases import NAMES, bits, data_of, served_of, small
from transformers import AutoModelForCausalLM

from bmoe_lightning import BayesianMoECallback, LoRAFinetuner
from bmoe_lightning.serving import CalibratedModel


def test_a_saved_model_predicts_the_same_bits_wherever_it_lies(saved, trained_run, tmp_path):
    served = CalibratedModel.from_pretrained(saved)
    assert [method.name for method in served.methods] == list(NAMES)
    expected = {name: bits(served, name) for name in NAMES}
    for name, value in expected.items():
        torch.testing.assert_close(value, bits(served_of(trained_run), name), rtol=0, atol=1e-4)
    served.save_pretrained(tmp_path / "again")
    first = shutil.move(shutil.copytree(saved, tmp_path / "copy"), tmp_path / "moved")
    for folder in (tmp_path / "again", first):
        found = CalibratedModel.from_pretrained(folder)
        assert [name for name in NAMES if not torch.equal(bits(found, name), expected[name])] == []


def test_a_relative_folder_is_served_from_anywhere(saved, monkeypatch):
    monkeypatch.chdir(saved.parent)
    from_parent = bits(CalibratedModel.from_pretrained(saved.name), "laplace_mixture")
    monkeypatch.chdir(saved)
    assert torch.equal(bits(CalibratedModel.from_pretrained("."), "laplace_mixture"), from_parent)


def test_nothing_outside_of_the_folder_is_needed(copied, trained_run):
    text = (copied / "calibrated_model.json").read_text()
    assert str(trained_run.folder) not in text
    assert "other.safetensors" not in text
    assert str(trained_run.folder) not in (copied / "README.md").read_text()
    assert not [path for path in copied.rglob("*") if path.suffix in (".bin", ".pt", ".pkl", ".ckpt")]


def test_the_model_loads_in_transformers(saved):
    model = AutoModelForCausalLM.from_pretrained(saved)
    served = CalibratedModel.from_pretrained(saved)
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in served.model.state_dict().items())


def test_other_content_is_not_overwritten(saved, tmp_path):
    served = CalibratedModel.from_pretrained(saved, methods=["map"])
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path, tmp_path / "file", saved):
        with pytest.raises(ValueError, match="has other content"):
            served.save_pretrained(folder)
    (tmp_path / "empty").mkdir()
    served.save_pretrained(tmp_path / "empty")
    assert CalibratedModel.from_pretrained(tmp_path / "empty").methods == served.methods


def test_a_failed_write_leaves_nothing(saved, tmp_path, monkeypatch):
    served = CalibratedModel.from_pretrained(saved, methods=["map"])
    monkeypatch.setattr(type(served.tokenizer), "save_pretrained", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        served.save_pretrained(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_adapters_are_not_saved(tmp_path):
    pytest.importorskip("peft")
    data, callback = data_of(), BayesianMoECallback([small("temperature")], dirpath=str(tmp_path / "fit"))
    module = LoRAFinetuner(qwen(), learning_rate=0.01)
    trainer(tmp_path, callback).fit(module, datamodule=data)
    served = CalibratedModel.of_run(module, data, callback)
    assert served.predict(TEST).log_probs.shape == (len(TEST), 4)
    with pytest.raises(ValueError, match=r"adapters of PEFT.*serve it from the folder of its run"):
        served.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
