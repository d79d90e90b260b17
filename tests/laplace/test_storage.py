import json
import os
import stat
from dataclasses import asdict

import pytest
import torch
from oracles.models import answer_logits, split, toy_batch, toy_model
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from bmoe_lightning.curvature import collect_factors
from bmoe_lightning.laplace import LaplacePosterior
from bmoe_lightning.laplace.storage import FORMAT
from bmoe_lightning.utils import safetensors_io as tensor_file


@pytest.fixture(scope="module")
def posterior():
    factors = collect_factors(toy_model(idle=[1]), answer_logits, [toy_batch()], rank=3, num_examples=50)
    return LaplacePosterior(factors, torch.tensor([0.1, 1 / 3]).double(), prior_mean="zero")


@pytest.fixture
def path(posterior, tmp_path):
    path = tmp_path / "posterior.safetensors"
    posterior.save(path)
    return path


def contents(path):
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata())  # noqa: SIM118


def rewritten(path, *, tensors=None, header=None, without=()):
    """The file with some of it changed."""
    old, metadata = contents(path)
    described = {**json.loads(metadata[FORMAT]), **(header or {})}
    described = {key: value for key, value in described.items() if key not in without}
    kept = {key: value for key, value in {**old, **(tensors or {})}.items() if key not in without}
    save_file(kept, path, {FORMAT: json.dumps(described)})
    return path


def test_every_bit_comes_back(posterior, path):
    loaded = LaplacePosterior.load(path)
    assert loaded.factors.description() == posterior.factors.description()
    assert loaded.prior_mean == "zero"
    assert torch.equal(loaded.prior_precision, posterior.prior_precision)
    for x, y in zip(loaded.factors.layers, posterior.factors.layers, strict=True):
        assert (x.name, x.index) == (y.name, y.index)
        for name, tensor in y.tensors().items():
            assert x.tensors()[name].dtype == tensor.dtype
            assert torch.equal(x.tensors()[name], tensor)
    model, batch = toy_model(idle=[1]), toy_batch(seed=9)
    found, expected = (p.logit_covariance(model, answer_logits, batch)[1] for p in (loaded, posterior))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)  # tensors from a file lie elsewhere in memory


def test_half_precision_comes_back_and_takes_half(tmp_path):
    factors = collect_factors(toy_model(width=64, inner=64).float(), answer_logits, [toy_batch()], rank=20)
    sizes = []
    for kept in (factors, factors.to(dtype=torch.bfloat16)):
        LaplacePosterior(kept).save(tmp_path / "p.safetensors")
        sizes.append((tmp_path / "p.safetensors").stat().st_size)
        loaded = LaplacePosterior.load(tmp_path / "p.safetensors").factors
        for x, y in zip(loaded.layers, kept.layers, strict=True):
            for name, tensor in y.tensors().items():
                assert x.tensors()[name].dtype == tensor.dtype
                assert torch.equal(x.tensors()[name], tensor)
    assert sizes[1] < 0.56 * sizes[0]


def test_float32_and_a_part_of_the_layers(tmp_path):
    model = toy_model(num_layers=3).float()
    posterior = LaplacePosterior(collect_factors(model, answer_logits, [toy_batch()], rank=2)).without_layers([0])
    posterior.save(tmp_path / "p.safetensors")
    loaded = LaplacePosterior.load(tmp_path / "p.safetensors")
    assert [layer.index for layer in loaded.factors.layers] == [1, 2]
    assert loaded.factors.layers[0].a_basis.dtype == torch.float32
    batch = split(toy_batch(), 2, 3)[0]
    found, expected = (p.predict(model, answer_logits, batch, "probit") for p in (loaded, posterior))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_header_tells_what_it_is(path):
    header = json.loads(contents(path)[1][FORMAT])
    assert header["version"] == 1
    assert header["rank"] == 3
    assert header["fisher"] == "exact"
    assert [layer["name"] for layer in header["layers"]] == ["layers.0.mixture.crew", "layers.1.mixture.crew"]


def test_saving_makes_folders_and_leaves_nothing_else(posterior, tmp_path):
    posterior.save(tmp_path / "a" / "b" / "p.safetensors")
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["p.safetensors"]


def test_permissions_are_those_of_any_new_file(posterior, tmp_path):
    """Not the 0600 of temporary files: colleagues read it, too."""
    before = os.umask(0o022)
    try:
        posterior.save(tmp_path / "p.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "p.safetensors").stat().st_mode) == 0o644


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error: disk full")])
def test_a_full_disk_leaves_the_old_file(posterior, path, monkeypatch, error):
    old = path.read_bytes()

    def fail(tensors, filename, metadata):
        with open(filename, "wb") as file:  # noqa: PTH123
            file.write(b"half of it")
        raise error

    monkeypatch.setattr(tensor_file, "save_file", fail)
    with pytest.raises(OSError, match=r"No space left|could not write .*posterior.safetensors.*is unchanged"):
        posterior.with_prior_precision(7.0).save(path)
    assert path.read_bytes() == old
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    monkeypatch.undo()
    posterior.with_prior_precision(7.0).save(path)
    assert LaplacePosterior.load(path).prior_precision.tolist() == [7.0, 7.0]


def test_an_interruption_leaves_the_old_file(posterior, path, monkeypatch):
    old = path.read_bytes()

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        posterior.save(path)
    assert path.read_bytes() == old
    assert len(list(path.parent.iterdir())) == 1


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_truncated(path, share):
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"is no complete safetensors file.*cut off"):
        LaplacePosterior.load(path)


def test_foreign(path, tmp_path):
    path.write_bytes(b"PK\x03\x04 a zip, as torch.save writes it" * 10)
    with pytest.raises(ValueError, match="no complete safetensors file"):
        LaplacePosterior.load(path)
    save_file({"weight": torch.ones(2)}, path, {"format": "pt"})
    with pytest.raises(ValueError, match="is a safetensors file, but no posterior"):
        LaplacePosterior.load(path)
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="but no posterior"):
        LaplacePosterior.load(path)
    with pytest.raises(FileNotFoundError, match="no posterior at"):
        LaplacePosterior.load(tmp_path / "nothing.safetensors")
    with pytest.raises(FileNotFoundError, match="no posterior at"):
        LaplacePosterior.load(tmp_path)


def test_a_layout_of_another_release(posterior, path):
    layers = [{**asdict(layer), "layout": "striped"} for layer in posterior.factors.expert_layers]
    with pytest.raises(ValueError, match=r"expert layers of a layout \['striped'\] that this release does not know"):
        LaplacePosterior.load(rewritten(path, header={"expert_layers": layers}))


def test_other_version(path):
    with pytest.raises(ValueError, match="has version 2 of the posterior format; this release reads version 1"):
        LaplacePosterior.load(rewritten(path, header={"version": 2}))
    with pytest.raises(ValueError, match="has version None"):
        LaplacePosterior.load(rewritten(path, without=["version"]))


@pytest.mark.parametrize("missing", ["rank", "fingerprint", "layers", "expert_layers", "prior_mean"])
def test_incomplete_header(path, missing):
    with pytest.raises(ValueError, match="incomplete header"):
        LaplacePosterior.load(rewritten(path, without=[missing]))


def test_header_that_is_no_json(path):
    tensors, _ = contents(path)
    for text in ("{broken", "[1, 2]"):
        save_file(tensors, path, {FORMAT: text})
        with pytest.raises(ValueError, match=r"posterior.safetensors has a header that is no JSON"):
            LaplacePosterior.load(path)


@pytest.mark.parametrize("header", [{"layers": [{}, {}]}, {"layers": ["a", "b"]}, {"expert_layers": [{"name": "x"}]}])
def test_header_that_does_not_describe_its_layers(path, header):
    with pytest.raises(ValueError, match=r"posterior.safetensors has a header that does not describe its layers"):
        LaplacePosterior.load(rewritten(path, header=header))


@pytest.mark.parametrize(
    "name", ["slots", "a_basis", "a_eigenvalues", "g_basis", "g_eigenvalues", "a_trace", "g_trace"]
)
def test_missing_tensor(path, name):
    with pytest.raises(ValueError, match=rf"lacks \['{name}'\] of layer 'layers.1.mixture.crew'"):
        LaplacePosterior.load(rewritten(path, without=[f"1.{name}"]))


def test_missing_precision(path):
    with pytest.raises(ValueError, match="no prior precision for its 2 layers"):
        LaplacePosterior.load(rewritten(path, without=["prior_precision"]))
    with pytest.raises(ValueError, match="no prior precision for its 2 layers"):
        LaplacePosterior.load(rewritten(path, tensors={"prior_precision": torch.ones(3)}))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("slots", (3,)),
        ("a_eigenvalues", (4, 2)),
        ("g_eigenvalues", (4, 2)),
        ("a_trace", (5,)),
        ("g_basis", (3, 6, 3)),
        ("a_basis", (4, 15)),
    ],
)
def test_shapes_that_do_not_fit(path, name, shape):
    with pytest.raises(ValueError, match=r"posterior.safetensors.*layer 'layers.0.mixture.crew'"):
        LaplacePosterior.load(rewritten(path, tensors={f"0.{name}": torch.ones(shape)}))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite(path, value):
    bases, _ = contents(path)
    bases["0.g_basis"][2, 1, 0] = value
    with pytest.raises(ValueError, match=r"layer 'layers.0.mixture.crew' holds values that are not finite"):
        LaplacePosterior.load(rewritten(path, tensors=bases))
    with pytest.raises(ValueError, match="must be positive and finite"):
        LaplacePosterior.load(
            rewritten(path, tensors={"0.g_basis": torch.ones(4, 6, 3), "prior_precision": -torch.ones(2)})
        )
