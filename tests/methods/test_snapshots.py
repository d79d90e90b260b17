import pytest
import torch
from oracles.models import answer_logits, toy_model

from bmoe_lightning.methods import apply_snapshot, read_snapshot, save_snapshot, swapped_weights
from bmoe_lightning.methods.snapshots import remove_snapshot, snapshot_info
from bmoe_lightning.utils.safetensors_io import OpenedTensorFile, write_tensor_file

DOWN = ["layers.0.mixture.crew.down_proj", "layers.1.mixture.crew.down_proj"]


def parameters(model, names=DOWN):
    return {name: model.get_parameter(name) for name in names}


@pytest.fixture
def other(tmp_path):
    """A snapshot of another model's second weights."""
    path = tmp_path / "other.safetensors"
    save_snapshot(path, parameters(toy_model(seed=3)))
    return path


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


def test_restores_after_an_exception(model, other):
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with pytest.raises(KeyboardInterrupt), swapped_weights(model, other):
        raise KeyboardInterrupt
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("at", [1, 2, 3, 4])  # each tensor is read twice
def test_restores_when_reading_fails_half_way(model, other, monkeypatch, at):
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    read, reads = OpenedTensorFile.read, []

    def failing(self, name):
        reads.append(name)
        if len(reads) == at:
            raise OSError("the disk is gone")
        return read(self, name)

    monkeypatch.setattr(OpenedTensorFile, "read", failing)
    with pytest.raises(OSError, match="disk"), swapped_weights(model, other):
        pytest.fail("entered with half a snapshot")
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def swap(model, source):
    with swapped_weights(model, source):
        pytest.fail("entered")


def assert_refused_untouched(model, use, source, message):
    """Refused before a parameter was written to."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    versions = {name: parameter._version for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        use(model, source)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert {name: parameter._version for name, parameter in model.named_parameters()} == versions


@pytest.mark.parametrize("use", [apply_snapshot, swap])
def test_damage_in_the_last_tensor_is_found_before_anything_is_touched(model, other, use):
    content = bytearray(other.read_bytes())
    content[-1] ^= 1
    other.write_bytes(content)
    assert_refused_untouched(model, use, other, f"{DOWN[1]}' does not match its SHA-256 digest")


@pytest.mark.parametrize("use", [apply_snapshot, swap])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_refused(model, tmp_path, use, value):
    weights = {name: parameter.detach().clone() for name, parameter in parameters(model).items()}
    weights[DOWN[1]][2, 1, 0] = value
    save_snapshot(tmp_path / "s", weights)
    assert_refused_untouched(model, use, tmp_path / "s", f"non-finite values in '{DOWN[1]}'")


class TestTensorsInPlaceOfAFile:
    def test_are_swapped_in_and_out(self, model):
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        given = {name: parameter.detach() for name, parameter in parameters(toy_model(seed=3)).items()}
        with swapped_weights(model, given):
            for name, parameter in model.named_parameters():
                assert torch.equal(parameter, given.get(name, before[name]))
        assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"z.other": torch.zeros(2)}, r"^the source contains 1 tensors that .* the first is 'z\.other'"),
            ({DOWN[1]: torch.zeros(2, 3)}, r"shape \(2, 3\), the model has \(4, 6, 5\)"),
            ({DOWN[1]: torch.full((4, 6, 5), torch.nan)}, "non-finite values"),
        ],
    )
    def test_that_do_not_fit_are_refused(self, model, change, message):
        source = {name: parameter.detach().clone() for name, parameter in parameters(model).items()} | change
        assert_refused_untouched(model, swap, source, message)


class TestInfo:
    def test_fit_digest_and_shapes_without_reading_tensors(self, tmp_path):
        digest = save_snapshot(tmp_path / "s", {"a": torch.zeros(2, 3)}, fit="fit-1")
        info = snapshot_info(tmp_path / "s")
        assert (info.shapes, info.fit, info.digest) == ({"a": (2, 3)}, "fit-1", digest)

    def test_removes_snapshots_alone(self, tmp_path, other):
        write_tensor_file(tmp_path / "p", {"a": torch.zeros(2)}, format="posterior", version=1, description={})
        assert not remove_snapshot(tmp_path / "p")
        assert remove_snapshot(other)
        assert [p.name for p in tmp_path.iterdir()] == ["p"]


def test_works_in_inference_mode_and_leaves_trainable_parameters(model, other, batches):
    before = model.get_parameter(DOWN[0]).detach().clone()
    with torch.inference_mode(), swapped_weights(model, other):
        assert not torch.equal(model.get_parameter(DOWN[0]), before)
    assert torch.equal(model.get_parameter(DOWN[0]), before)
    answer_logits(model, batches[0])[0][:, :3].sum().backward()
    assert model.get_parameter(DOWN[0]).grad is not None


@pytest.mark.parametrize("use", [apply_snapshot, swap])
@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"z.other": torch.zeros(2)}, r"does not have, the first is 'z\.other'"),
        ({DOWN[1]: torch.zeros(2, 3)}, r"shape \(2, 3\), the model has \(4, 6, 5\)"),
    ],
)
def test_refuses_unknown_names_and_other_shapes_before_touching_anything(model, tmp_path, use, second, message):
    save_snapshot(tmp_path / "s", {DOWN[0]: torch.zeros_like(model.get_parameter(DOWN[0])), **second})
    assert_refused_untouched(model, use, tmp_path / "s", message)


def test_an_empty_snapshot_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no parameters to save"):
        save_snapshot(tmp_path / "empty", {})


def test_reads_all_tensors(tmp_path):
    tensors = {"a": torch.arange(4.0), "b.c": torch.ones(2, 3, dtype=torch.bfloat16)}
    save_snapshot(tmp_path / "s", tensors)
    found = read_snapshot(tmp_path / "s")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in tensors.items())
