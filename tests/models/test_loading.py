import json

import pytest
import torch
from oracles.models import tiny_qwen
from published import write_published_folder
from safetensors.torch import load_file, save_file

from bmoe_lightning.data.tokenizer import train_word_tokenizer
from bmoe_lightning.models.loading import ModelUnavailableError, load_causal_model, load_tokenizer


@pytest.fixture
def model():
    return tiny_qwen(dtype=torch.float32, implementation="grouped_mm")


@pytest.fixture
def folder(tmp_path, model):
    return write_published_folder(tmp_path / "published", model)


def test_reads_one_matrix_an_expert(folder, model):
    assert "model.layers.0.mlp.experts.0.down_proj.weight" in load_file(folder / "model.safetensors")
    found = load_causal_model(str(folder)).state_dict()
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("dtype", "expected"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_the_dtype_is_as_asked(folder, dtype, expected):
    assert {parameter.dtype for parameter in load_causal_model(str(folder), dtype).parameters()} == {expected}
    assert torch.get_default_dtype() == torch.float32


def test_loads_inside_a_trainers_device_context_without_accelerate(folder):
    with torch.device("meta"):
        found = load_causal_model(str(folder))
    assert {parameter.device.type for parameter in found.parameters()} == {"cpu"}


def test_a_folder_that_lacks_weights_is_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    gone = [name for name in tensors if "layers.1.mlp.experts" in name and "down_proj" in name]
    save_file({n: t for n, t in tensors.items() if n not in gone}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelUnavailableError, match=r"would stay random.*layers\.1\.mlp\.experts\.down_proj"):
        load_causal_model(str(folder))


def rewritten(folder, change):
    """Change the weights of a folder."""
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def test_a_folder_that_lacks_one_expert_is_refused(folder):
    lacking = rewritten(folder, lambda tensors: {n: t for n, t in tensors.items() if "1.mlp.experts.3." not in n})
    with pytest.raises(
        ModelUnavailableError, match=r"experts\.down_proj \(shape \[3, 16, 12\] in the files, \[4, 16, 12\]"
    ):
        load_causal_model(lacking)


def test_a_folder_that_lacks_one_matrix_of_an_expert_is_refused(folder):
    lacking = rewritten(folder, lambda tensors: {n: t for n, t in tensors.items() if "1.mlp.experts.3.up" not in n})
    with pytest.raises(ModelUnavailableError, match="cannot be stacked: some layer lacks a matrix of an expert"):
        load_causal_model(lacking)


def test_other_failures_while_loading_are_not_taken_for_missing_weights(folder, monkeypatch):
    def out_of_memory(*_, **__):
        raise RuntimeError("cannot allocate memory")

    monkeypatch.setattr("bmoe_lightning.models.loading.AutoModelForCausalLM.from_pretrained", out_of_memory)
    with pytest.raises(RuntimeError, match="cannot allocate memory") as caught:
        load_causal_model(str(folder))
    assert not isinstance(caught.value, ModelUnavailableError)


def test_tensors_that_the_model_has_no_place_for_are_named(folder):
    surplus = rewritten(folder, lambda tensors: tensors | {f"extra.{i}": torch.ones(1) for i in range(5)})
    with pytest.warns(UserWarning, match=r"no place for 5 of .*extra\.0, extra\.1, extra\.2 and 2 more"):
        load_causal_model(surplus)


def test_a_whole_folder_gives_no_warning(folder, recwarn):
    load_causal_model(str(folder))
    assert not [warning for warning in recwarn if "no place for" in str(warning.message)]


def test_a_configuration_of_wrong_types_gives_one_sentence(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": "wide"}))
    with pytest.raises(ValueError, match=r"does not describe a model .*hidden_size") as caught:
        load_causal_model(str(folder))
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_exists_as_code_alone_is_refused_without_asking(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "unheard_of"}))
    config = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("raise SystemExit('code of the folder was run')\n")
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_tokenizer(str(tmp_path))


def test_a_word_tokenizer_loads_as_it_was_saved(tmp_path):
    saved = train_word_tokenizer(["what is this? Answer: A"], max_vocab=30)
    saved.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.get_vocab() == saved.get_vocab()
    assert loaded("this is A")["input_ids"] == saved("this is A")["input_ids"]


def test_a_folder_cut_short_is_refused(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelUnavailableError, match="complete"):
        load_causal_model(str(folder))
    file.unlink()
    with pytest.raises(ModelUnavailableError, match="could not be loaded"):
        load_causal_model(str(folder))


@pytest.mark.parametrize(("source", "says"), [("nobody/nothing", "works without the hub"), ("./gone", "no folder")])
def test_a_model_that_cannot_be_loaded_gives_one_sentence(source, says):
    with pytest.raises(ModelUnavailableError, match=says) as caught:
        load_causal_model(source)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None or caught.value.__suppress_context__
