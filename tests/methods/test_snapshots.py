import pytest
import torch
from oracles.models import answer_logits, toy_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from bmoe_lightning.methods import apply_snapshot, save_snapshot, swapped_weights
from bmoe_lightning.methods.snapshots import FORMAT
from bmoe_lightning.utils import safetensors_io as tensor_file

DOWN = ["layers.0.mixture.crew.down_proj", "layers.1.mixture.crew.down_proj"]


def parameters(model, names=DOWN):
    return {name: model.get_parameter(name) for name in names}


@pytest.fixture
def other(tmp_path):
    """A snapshot of another model's second weights."""
    path = tmp_path / "other.safetensors"
    save_snapshot(path, parameters(toy_model(seed=3)))
    return path


def test_comes_back_bit_equal(tmp_path):
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(5).bfloat16(), "c": torch.randn(2, 3, 4).mT.double()}
    save_snapshot(tmp_path / "deep" / "one.safetensors", tensors)
    found = load_file(tmp_path / "deep" / "one.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["one.safetensors"]


def test_swaps_in_place_and_restores_bit_equal(model, other, batches):
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    objects = {name: id(parameter) for name, parameter in model.named_parameters()}
    expected = toy_model()
    with torch.no_grad():
        for name, value in parameters(toy_model(seed=3)).items():
            expected.get_parameter(name).copy_(value)
    with swapped_weights(model, other):
        assert torch.equal(answer_logits(model, batches[0])[0], answer_logits(expected, batches[0])[0])
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == objects
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_applies_in_place_and_for_good(model, other):
    objects = {name: id(parameter) for name, parameter in model.named_parameters()}
    expected = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    expected |= parameters(toy_model(seed=3))
    apply_snapshot(model, other)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == objects
    assert all(torch.equal(parameter, expected[name]) for name, parameter in model.named_parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_restores_a_model_that_was_moved_meanwhile(model, other):
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with swapped_weights(model, other):
        model.double()
    assert all(torch.equal(parameter, before[name].double()) for name, parameter in model.named_parameters())


@pytest.fixture
def failing_read(monkeypatch):
    """Lets the n-th tensor that is read from an opened file raise an error."""
    opened = tensor_file.safe_open

    def fail(at, error):
        class Failing:
            def __init__(self, *args, **kwargs):
                self.file, self.reads = opened(*args, **kwargs), 0

            def __enter__(self):
                self.file = self.file.__enter__()
                return self

            def __exit__(self, *args):
                return self.file.__exit__(*args)

            def __getattr__(self, name):
                return getattr(self.file, name)

            def get_tensor(self, name):
                self.reads += 1
                if self.reads == at:
                    raise error
                return self.file.get_tensor(name)

        monkeypatch.setattr(tensor_file, "safe_open", Failing)

    return fail


def test_a_read_error_is_no_damaged_file(model, other, failing_read):
    failing_read(1, SafetensorError("no such tensor"))
    with pytest.raises(SafetensorError, match="no such tensor"):
        apply_snapshot(model, other)


def test_restores_after_an_exception(model, other):
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with pytest.raises(KeyboardInterrupt), swapped_weights(model, other):
        raise KeyboardInterrupt
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_restores_when_reading_fails_half_way(model, other, failing_read):
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    failing_read(2, OSError("the disk is gone"))
    with pytest.raises(OSError, match="disk"), swapped_weights(model, other):
        pytest.fail("entered with half a snapshot")
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_works_in_inference_mode_and_leaves_trainable_parameters(model, other, batches):
    before = model.get_parameter(DOWN[0]).detach().clone()
    with torch.inference_mode(), swapped_weights(model, other):
        assert not torch.equal(model.get_parameter(DOWN[0]), before)
    assert torch.equal(model.get_parameter(DOWN[0]), before)
    answer_logits(model, batches[0])[0][:, :3].sum().backward()
    assert model.get_parameter(DOWN[0]).grad is not None


def test_refuses_unknown_names_before_touching_anything(model, tmp_path):
    save_snapshot(tmp_path / "s", {DOWN[0]: torch.zeros_like(model.get_parameter(DOWN[0])), "z.other": torch.zeros(2)})
    before = model.get_parameter(DOWN[0]).detach().clone()
    with (
        pytest.raises(ValueError, match=r"does not have, the first is 'z\.other'"),
        swapped_weights(model, tmp_path / "s"),
    ):
        pytest.fail("entered")
    assert torch.equal(model.get_parameter(DOWN[0]), before)


def test_refuses_other_shapes_before_touching_anything(model, tmp_path):
    save_snapshot(tmp_path / "s", {DOWN[0]: torch.zeros_like(model.get_parameter(DOWN[0])), DOWN[1]: torch.zeros(2, 3)})
    before, version = model.get_parameter(DOWN[0]).detach().clone(), model.get_parameter(DOWN[0])._version
    with (
        pytest.raises(ValueError, match=r"shape \(2, 3\), the model has \(4, 6, 5\)"),
        swapped_weights(model, tmp_path / "s"),
    ):
        pytest.fail("entered")
    assert torch.equal(model.get_parameter(DOWN[0]), before)
    assert model.get_parameter(DOWN[0])._version == version


def test_refuses_what_is_no_snapshot(tmp_path, other, model):
    with pytest.raises(FileNotFoundError, match="no snapshot at"):
        apply_snapshot(model, tmp_path / "nothing")
    save_file({"a": torch.zeros(2)}, tmp_path / "foreign")
    with pytest.raises(ValueError, match="no snapshot of bmoe_lightning"):
        apply_snapshot(model, tmp_path / "foreign")
    save_file({"a": torch.zeros(2)}, tmp_path / "newer", {FORMAT: "99"})
    with pytest.raises(ValueError, match="version 99"):
        apply_snapshot(model, tmp_path / "newer")
    (tmp_path / "cut").write_bytes(other.read_bytes()[:-20])
    with pytest.raises(ValueError, match="cut off"):
        apply_snapshot(model, tmp_path / "cut")
    with pytest.raises(ValueError, match="without tensors"):
        save_snapshot(tmp_path / "empty", {})


def test_a_full_disk_leaves_the_old_file(tmp_path, other, monkeypatch):
    old = other.read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bmoe_lightning.utils.safetensors_io.save_file", full)
    with pytest.raises(OSError, match="No space"):
        save_snapshot(other, {"a": torch.zeros(3)})
    assert other.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == [other.name]
