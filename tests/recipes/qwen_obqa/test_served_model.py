"""A finished run is served from its output folder, wherever that lies."""

from __future__ import annotations

import shutil
import types

import pytest
import torch
from recipe_runs import run
from serving_cases import edit_json

from bmoe_lightning.serving import CalibratedModel, Manifest
from bmoe_lightning.utils.file_header import DamagedFileError
from bmoe_lightning.utils.json_io import write_json_file
from bmoe_lightning.utils.safetensors_io import read_tensor_file
from recipes.qwen_obqa.methods import build_methods
from recipes.qwen_obqa.run_folder import RUN_FILE, check_files
from recipes.qwen_obqa.served_model import fitted_digests
from recipes.qwen_obqa.settings import Settings
from recipes.qwen_obqa.sources import prepare_source

METHODS = "map,temperature,laplace_lpo,checkpoint_ensemble,deep_ensemble,laplace_mixture,router_noise,swag"


def check_served(folder, methods, tolerance, **chosen):
    """A run's stored predictions are those of its folder, served from another place."""
    names = tuple(methods.split(","))
    settings = Settings(dry_run=True, quiet=True, output_dir=str(folder), methods=names, **chosen).resolved()
    data = prepare_source(settings, build_methods(settings)).data(0)
    questions, size = data.questions("test"), data.eval_batch_size
    moved = shutil.move(folder, folder.parent / "moved")
    config = next(moved.glob("model/*/config.json"))
    before = config.read_bytes()
    edit_json(config, rms_norm_eps=0.1)
    with pytest.raises(DamagedFileError, match=r"config.json is not the file of the fit"):
        CalibratedModel.from_pretrained(moved)
    config.write_bytes(before)
    served = CalibratedModel.from_pretrained(moved)
    known = Manifest.read(moved / "seed-0")
    assert set(known.model_sha256) == {"config.json"}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= set(known.tokenizer_sha256)
    assert [method.name for method in served.methods] == list(names)
    for name in names:
        path = moved / "seed-0" / "predictions" / f"{name}.safetensors"
        stored = read_tensor_file(path, format="predictions", version=1).tensors["log_probs"]
        found = served.predict(questions, name, batch_size=size).probabilities
        torch.testing.assert_close(found, stored.exp(), rtol=0, atol=tolerance)
    return served


def test_digests_are_those_that_the_seed_has_started_with(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "tokenizer.json", "entities.json"):
        (model / name).write_text("{}")
    write_json_file(tmp_path / RUN_FILE, format="description of a run", version=1, description={})
    source = types.SimpleNamespace(model_of=lambda seed: str(model), tokenizer=str(model))
    training = types.SimpleNamespace(source=source, output=tmp_path, seed=0)
    tokenizer = types.SimpleNamespace(vocab_files_names={"vocab_file": "entities.json"})
    expected = fitted_digests(training, tokenizer)
    assert [set(found) for found in expected] == [{"config.json"}, {"config.json", "tokenizer.json", "entities.json"}]
    check_files(tmp_path, 0, str(model))
    for name in ("config.json", "tokenizer.json", "added_tokens.json"):  # while it trains
        (model / name).write_text("[]")
    assert fitted_digests(training, tokenizer) == expected


@pytest.mark.slow
@pytest.mark.parametrize("prompt", ["cloze"])
def test_a_moved_run_predicts_what_it_has_stored(tmp_path, prompt):
    assert run(tmp_path / "run", "--methods", METHODS, "--prompt", prompt) == 0
    check_served(tmp_path / "run", METHODS, 1e-5, prompt=prompt)


@pytest.mark.slow
def test_a_run_in_half_precision_predicts_what_it_has_stored(tmp_path):
    methods = "map,temperature,laplace_lpo,swag"
    assert run(tmp_path / "run", "--methods", methods, "--precision", "bf16-true") == 0
    served = check_served(tmp_path / "run", methods, 0.02, precision="bf16-true")
    assert served.precision == "bf16-true"
    assert served.model.dtype == torch.bfloat16


@pytest.mark.slow
def test_adapters_are_served_from_the_folder_of_their_run(tmp_path):
    pytest.importorskip("peft")
    methods = "map,temperature,mc_dropout,bayesian_lora"
    assert run(tmp_path / "run", "--train", "lora", "--methods", methods) == 0
    served = check_served(tmp_path / "run", methods, 1e-5, train="lora")
    with pytest.raises(ValueError, match=r"adapters of PEFT.*serve it from the folder of its run"):
        served.save_pretrained(tmp_path / "saved")
