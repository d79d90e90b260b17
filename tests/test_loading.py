import pytest
import torch
from oracles.models import tiny_qwen
from published import write_published_folder
from safetensors.torch import load_file, save_file

from bmoe_lightning.loading import ModelUnavailableError, load_causal_model


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


def test_a_folder_cut_short_is_refused(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelUnavailableError, match="whole"):
        load_causal_model(str(folder))
    file.unlink()
    with pytest.raises(ModelUnavailableError, match="could not be had"):
        load_causal_model(str(folder))


@pytest.mark.parametrize(("source", "says"), [("nobody/nothing", "works without the hub"), ("./gone", "no folder")])
def test_a_model_that_cannot_be_had_gives_one_sentence(source, says):
    with pytest.raises(ModelUnavailableError, match=says) as caught:
        load_causal_model(source)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None or caught.value.__suppress_context__
