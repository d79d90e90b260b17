"""A run's folder is not served with another configuration or tokenizer of its model than its fit had."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from finetuner_cases import TEST
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from serving_cases import as_run, bits, edit_json, edit_manifest, name_model

from bmoe_lightning.laplace import WeightMismatchError
from bmoe_lightning.models.loading import ModelUnavailableError
from bmoe_lightning.serving import CalibratedModel
from bmoe_lightning.utils.file_header import DamagedFileError

FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")
CHANGED = {
    "config.json": {"rms_norm_eps": 0.1},
    "tokenizer.json": {"normalizer": {"type": "Lowercase"}},
    "tokenizer_config.json": {"padding_side": "left"},
}


def load(folder, **options):
    return CalibratedModel.from_pretrained(folder, methods=["map"], **options)


@pytest.fixture
def base(copied):
    """The model of a run, whose folder is `copied`."""
    return as_run(copied)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_was_changed_after_the_fit_is_named_until_it_is_restored(copied, base, name):
    path = base / name
    before = path.read_bytes()
    edit_json(path, **CHANGED[name])
    sentence = (
        rf"{name} is not the file of the fit: it was changed since; restore what .* pass verify=False to Calibrated"
    )
    with pytest.raises(DamagedFileError, match=sentence):
        load(copied)
    assert load(copied, verify=False).methods
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing, which was there for the fit; restore"):
        load(copied)
    path.write_bytes(before)
    assert load(copied).methods


def test_a_configuration_gives_other_numbers_under_the_same_weights(saved, copied, base):
    expected = bits(load(saved), "map")
    assert torch.equal(bits(load(copied), "map"), expected)
    edit_json(base / "config.json", **CHANGED["config.json"])
    assert not torch.allclose(bits(load(copied, verify=False), "map"), expected, atol=1e-3)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.self_attn.q_proj.weight"])
def test_weights_that_were_not_trained_are_compared_too(trained_run, copied, base, name):
    assert name not in {weight.removeprefix("model.") for weight in trained_run.module.trained_parameters()}
    weights = load_file(base / "model.safetensors")
    save_file({**weights, name: weights[name] + 1e-3}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightMismatchError, match=name):
        load(copied, verify=False)


@pytest.mark.parametrize("name", ["added_tokens.json", "special_tokens_map.json", "vocab.json"])
def test_a_file_that_was_added_after_the_fit_is_named(copied, base, name):
    (base / name).write_text("{}")
    with pytest.raises(DamagedFileError, match=f"{name} was added after the fit"):
        load(copied)


def test_the_file_that_is_read_in_place_of_tokenizer_json_is_compared(copied, base):
    versioned = base / "tokenizer.4.0.0.json"
    shutil.copy(base / "tokenizer.json", versioned)
    edit_json(base / "tokenizer_config.json", fast_tokenizer_files=[versioned.name])
    name_model(copied, str(base), "../base")
    assert load(copied).methods
    edit_json(versioned, **CHANGED["tokenizer.json"])
    with pytest.raises(DamagedFileError, match=r"tokenizer.4.0.0.json is not the file of the fit"):
        load(copied)


def test_what_predictions_do_not_depend_on_may_change(copied, base):
    edit_json(base / "generation_config.json", temperature=2.0)
    (base / "README.md").write_text("Another card.")
    (base / "chat_template.jinja").write_text("{{ messages }}")
    assert load(copied).methods


def test_a_run_of_an_earlier_release_knows_no_files(copied, base):
    def change(content):
        del content["model_sha256"], content["tokenizer_sha256"]

    edit_manifest(copied, change)
    edit_json(base / "config.json", **CHANGED["config.json"])
    assert load(copied).methods


def test_a_model_of_the_hub_is_compared_in_its_cache(copied, base, tmp_path, monkeypatch):
    cached = tmp_path / "hub" / "models--owner--base"
    shutil.copytree(base, cached / "snapshots" / "0123abcd")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123abcd")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    name_model(copied, "owner/base", "owner/base")
    expected = load(copied).predict(TEST).log_probs
    moved = cached / "snapshots" / "4567abcd"  # the hub has another revision
    shutil.copytree(base, moved)
    (cached / "refs" / "main").write_text("4567abcd")
    assert torch.equal(load(copied).predict(TEST).log_probs, expected)
    edit_json(moved / "tokenizer.json", **CHANGED["tokenizer.json"])
    with pytest.raises(DamagedFileError, match=r"tokenizer.json of owner/base is not the file of the fit"):
        load(copied)
    (moved / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer.json of owner/base is not in the cache of the hub"):
        load(copied)
    shutil.rmtree(cached)
    with pytest.raises((FileNotFoundError, ModelUnavailableError), match="owner/base"):
        load(copied)


def test_a_saved_folder_of_a_run_has_digests_of_its_own(copied, base, tmp_path):
    load(copied).save_pretrained(tmp_path / "saved")
    content = json.loads((tmp_path / "saved" / "calibrated_model.json").read_text())["description"]
    assert content["model_sha256"] == content["tokenizer_sha256"] == {}
    assert set(FILES) < set(content["sha256"])
