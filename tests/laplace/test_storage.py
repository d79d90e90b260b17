"""What is particular to a posterior's file; what holds of all files is in `test_file_contract.py`."""

from dataclasses import asdict, replace

import pytest
import torch
from oracles.models import answer_logits, split, toy_batch, toy_model

from bmoe_lightning.curvature import collect_factors
from bmoe_lightning.laplace import LaplacePosterior
from bmoe_lightning.laplace.storage import FORMAT, VERSION, load_posterior, save_posterior
from bmoe_lightning.utils.safetensors_io import read_tensor_file, write_tensor_file


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
    return read_tensor_file(path, format=FORMAT, version=VERSION)


def rewritten(path, *, tensors=None, header=None, without=()):
    """The file with some of it changed, under digests that are right."""
    old = contents(path)
    described = {**old.description, **(header or {})}
    described = {key: value for key, value in described.items() if key not in without}
    kept = {key: value for key, value in {**old.tensors, **(tensors or {})}.items() if key not in without}
    write_tensor_file(path, kept, format=FORMAT, version=VERSION, description=described)
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
    factors = replace(factors, weights=None)  # in a small model as large as the factors
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
    header = contents(path).description
    assert header["rank"] == 3
    assert header["fisher"] == "exact"
    assert [layer["name"] for layer in header["layers"]] == ["layers.0.mixture.crew", "layers.1.mixture.crew"]


def test_fit_digest_and_description_come_back(posterior, tmp_path):
    description = {"layers": {"class": "ExpertLayers", "experts": None}, "max_batches": 4}
    arguments = (posterior.factors, posterior.prior_precision, "zero")
    digest = save_posterior(tmp_path / "p", *arguments, description=description, fit="fit-1")
    stored = load_posterior(tmp_path / "p")
    assert (stored.fit, stored.digest, stored.description) == ("fit-1", digest, description)
    assert save_posterior(tmp_path / "other", *arguments, description=description, fit="fit-2") != digest
    assert save_posterior(tmp_path / "again", *arguments, description=description, fit="fit-1") == digest
    assert (tmp_path / "again").read_bytes() == (tmp_path / "p").read_bytes()


def test_rank_zero(posterior, tmp_path):
    """The prior alone: no direction has any curvature."""
    layers = tuple(
        replace(
            layer,
            a_basis=layer.a_basis[..., :0],
            g_basis=layer.g_basis[..., :0],
            a_eigenvalues=layer.a_eigenvalues[:, :0],
            g_eigenvalues=layer.g_eigenvalues[:, :0],
        )
        for layer in posterior.factors.layers
    )
    factors = replace(posterior.factors, layers=layers, rank=0)
    LaplacePosterior(factors, 2.0).save(tmp_path / "p.safetensors")
    loaded = LaplacePosterior.load(tmp_path / "p.safetensors")
    assert loaded.factors.rank == 0
    assert [layer.a_basis.shape for layer in loaded.factors.layers] == [layer.a_basis.shape for layer in layers]
    model, batch = toy_model(idle=[1]), toy_batch(seed=9)
    prior_alone = LaplacePosterior(factors, 2.0).logit_covariance(model, answer_logits, batch)[1]
    torch.testing.assert_close(loaded.logit_covariance(model, answer_logits, batch)[1], prior_alone)


def test_what_a_later_release_adds_is_left_alone(posterior, path):
    layers = [{**asdict(layer), "added_later": 1} for layer in posterior.factors.expert_layers]
    described = [{"name": x.name, "index": x.index, "added_later": 1} for x in posterior.factors.layers]
    header = {"expert_layers": layers, "layers": described, "added_later": {"a": 1}}
    rewritten(path, header=header, tensors={"0.added_later": torch.ones(2), "added_later": torch.ones(1)})
    assert LaplacePosterior.load(path).factors.description() == posterior.factors.description()


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no posterior at .*nothing\.safetensors"):
        LaplacePosterior.load(tmp_path / "nothing.safetensors")


def test_a_layout_of_another_release(posterior, path):
    layers = [{**asdict(layer), "layout": "striped"} for layer in posterior.factors.expert_layers]
    with pytest.raises(ValueError, match=r"does not know the layout 'striped' of expert layer 'layers.0.mixture.crew'"):
        LaplacePosterior.load(rewritten(path, header={"expert_layers": layers}))


@pytest.mark.parametrize("missing", ["rank", "fingerprint", "layers", "expert_layers", "prior_mean"])
def test_incomplete_header(path, missing):
    with pytest.raises(
        ValueError, match=r"posterior\.safetensors contains no valid posterior: its header does not describe"
    ):
        LaplacePosterior.load(rewritten(path, without=[missing]))


@pytest.mark.parametrize("header", [{"layers": [{}, {}]}, {"layers": ["a", "b"]}, {"expert_layers": [{"name": "x"}]}])
def test_header_that_does_not_describe_its_layers(path, header):
    with pytest.raises(
        ValueError, match=r"posterior.safetensors .* header does not describe its layers .* Fit it again"
    ):
        LaplacePosterior.load(rewritten(path, header=header))


@pytest.mark.parametrize(
    "name", ["slots", "a_basis", "a_eigenvalues", "g_basis", "g_eigenvalues", "a_trace", "g_trace"]
)
def test_missing_tensor(path, name):
    with pytest.raises(ValueError, match=rf"it lacks \['{name}'\] of layer 'layers.1.mixture.crew'"):
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


def changed(**changes):
    """A function from a layer's tensors to changed ones."""
    return lambda tensors: {name: change(tensors[f"0.{name}"].clone()) for name, change in changes.items()}


def with_value(index, value):
    def change(tensor):
        tensor[index] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed(g_basis=with_value((2, 1, 0), torch.nan)), "g_basis has non-finite values"),
        (changed(a_eigenvalues=with_value((2, 0), torch.inf)), "a_eigenvalues has non-finite values"),
        (changed(g_eigenvalues=with_value((2, 2), -1e-9)), "g_eigenvalues has negative values"),
        (changed(a_eigenvalues=lambda t: t.flip(-1)), "a_eigenvalues are not in descending order"),
        (changed(slots=with_value(2, -1.0)), "slots has negative values"),
        (changed(a_eigenvalues=lambda t: 10 * t), "a_eigenvalues sum to more than a_trace"),
        (changed(g_trace=lambda t: 0.01 * t), "g_eigenvalues sum to more than g_trace"),
        (changed(a_basis=lambda t: 1.001 * t), "the columns of a_basis are not orthonormal"),
        (changed(g_basis=lambda t: t[..., [0, 0, 1]]), "the columns of g_basis are not orthonormal"),
        (changed(a_basis=lambda t: t.bfloat16() * 1.1), "the columns of a_basis are not orthonormal"),
        (changed(a_basis=lambda t: t.long()), "a_basis has the unexpected dtype torch.int64"),
        (changed(slots=lambda t: t.long()), "slots has the unexpected dtype torch.int64"),
        (changed(g_eigenvalues=lambda t: t.bfloat16()), "g_eigenvalues has the unexpected dtype torch.bfloat16"),
    ],
)
def test_values_that_no_posterior_has(path, change, message):
    """What a bug in a writer, or a tool that edits tensors, would leave behind."""
    tensors = {f"0.{name}": tensor for name, tensor in change(contents(path).tensors).items()}
    with pytest.raises(ValueError, match=rf"{message} in layer 'layers.0.mixture.crew'\. Fit it again"):
        LaplacePosterior.load(rewritten(path, tensors=tensors))


@pytest.mark.parametrize("value", [-1.0, 0.0, torch.nan, torch.inf])
def test_prior_precisions_that_are_none(path, value):
    with pytest.raises(ValueError, match="prior precisions must be positive and finite"):
        LaplacePosterior.load(rewritten(path, tensors={"prior_precision": torch.tensor([1.0, value])}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sketch", ["exact", "nystrom", "rsvd"])
def test_rounding_is_no_fault(tmp_path, sketch, dtype):
    """Wide layers, an expert without slots, and a trace that the eigenvalues take up to rounding."""
    model = toy_model(width=64, inner=64, idle=[1]).float()
    factors = collect_factors(model, answer_logits, split(toy_batch(), 2, 3), rank=64, sketch=sketch)
    LaplacePosterior(factors.to(dtype=dtype)).save(tmp_path / "p")
    assert LaplacePosterior.load(tmp_path / "p").factors.layers[0].a_basis.dtype == dtype
