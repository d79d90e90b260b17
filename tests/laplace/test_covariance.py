import pytest
import torch
from oracles.cases import ARRANGEMENTS, FULL, built, layouts
from oracles.dense import (
    dense_kfac,
    dense_logit_covariance,
    experts_modules,
    low_rank_blocks,
    observe,
    softmax_hessian,
    weight_jacobians,
)
from oracles.models import (
    answer_logits,
    split,
    tiny_qwen,
    toy_batch,
    toy_model,
)

from bmoe_lightning.curvature import collect_factors
from bmoe_lightning.experts.taps import Taps
from bmoe_lightning.laplace import LaplacePosterior, covariance, groups
from bmoe_lightning.laplace.covariance import GRADIENT_BYTES, num_sweeps


def jacobians(fused, class_logits, batch):
    logits = class_logits(fused, batch)[0]
    return logits, weight_jacobians(logits, [m.down_proj for m in experts_modules(fused)])


def dense(fused, class_logits, batch, posterior):
    """The covariance from autograd's Jacobians and inverses of whole blocks of the posterior's own factors."""
    _, j = jacobians(fused, class_logits, batch)
    blocks = [low_rank_blocks(layer) for layer in posterior.factors.layers]
    return dense_logit_covariance(j, blocks, posterior.prior_precision)


def assert_close(found, expected, tolerance=1e-10):
    assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


def centring(present):
    """`I - 11^T / K` over the classes of each example."""
    p = present.double()
    return torch.stack([torch.diag(row) - torch.outer(row, row) / row.sum() for row in p])


@layouts
@pytest.mark.parametrize("rank", [1, 3, FULL])
@pytest.mark.parametrize("precision", [0.1, 10.0])
def test_dense_covariance(layout, rank, precision):
    fused, model = built(layout)
    fit, batch = toy_batch(num_rows=9, seed=3), toy_batch()
    posterior = LaplacePosterior(collect_factors(model, answer_logits, [fit], rank=rank), precision)
    logits, found = posterior.logit_covariance(model, answer_logits, batch)
    assert found.dtype == logits.dtype == torch.float64
    torch.testing.assert_close(logits, answer_logits(fused, batch)[0].detach(), rtol=1e-12, atol=1e-12)
    assert_close(found, dense(fused, answer_logits, batch, posterior))


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_covariance_from_slots_seen_elsewhere(approximation):
    """The whole way, with nothing of the library in the reference: slots, factors, inverse, Jacobians."""
    model, fit, batch = toy_model(), toy_batch(num_rows=9, seed=3), toy_batch()
    logits, observed = observe(model, answer_logits, fit)
    factors = [dense_kfac(seen, softmax_hessian(logits), seen.owners, 4, approximation) for seen in observed]
    blocks = [[layer.block(e) for e in range(4)] for layer in factors]
    expected = dense_logit_covariance(jacobians(model, answer_logits, batch)[1], blocks, [2.0, 2.0])
    library = collect_factors(model, answer_logits, split(fit, 4, 5), rank=FULL, approximation=approximation)
    _, found = LaplacePosterior(library, 2.0).logit_covariance(model, answer_logits, batch)
    assert_close(found, expected)


@layouts
def test_an_idle_expert_contributes_its_prior(layout):
    """Expert 2 is never chosen while the curvature is collected, and always later."""
    fused, model = built(layout, num_layers=1, idle=[2], top_k=1)
    fit, batch = toy_batch(num_rows=9, seed=3), toy_batch()
    posterior = LaplacePosterior(collect_factors(model, answer_logits, [fit], rank=FULL), 4.0)
    assert float(posterior.factors.layers[0].slots[2]) == 0
    for m in {fused, model}:
        m.layers[0].mixture.config.idle = [0, 1, 3]
    _, found = posterior.logit_covariance(model, answer_logits, batch)
    _, (j,) = jacobians(fused, answer_logits, batch)
    assert float(j[:, :, [0, 1, 3]].abs().max()) == 0
    assert_close(found, j[:, :, 2] @ j[:, :, 2].mT / 4.0)
    assert_close(found, dense(fused, answer_logits, batch, posterior))


def test_under_a_strong_prior_it_is_the_prior():
    model, batch = toy_model(), toy_batch()
    factors = collect_factors(model, answer_logits, [batch], rank=FULL)
    _, found = LaplacePosterior(factors, 1e12).logit_covariance(model, answer_logits, batch)
    _, j = jacobians(model, answer_logits, batch)
    assert_close(found, sum(x.flatten(2) @ x.flatten(2).mT for x in j) / 1e12, 1e-9)


def test_one_precision_a_layer():
    model, batch = toy_model(num_layers=3), toy_batch()
    factors = collect_factors(model, answer_logits, [batch], rank=FULL)
    posterior = LaplacePosterior(factors, torch.tensor([0.3, 5.0, 40.0]))
    _, found = posterior.logit_covariance(model, answer_logits, batch)
    assert_close(found, dense(model, answer_logits, batch, posterior))
    named = LaplacePosterior(
        factors, {layer.name: p for layer, p in zip(factors.layers, [0.3, 5.0, 40.0], strict=True)}
    )
    assert_close(named.logit_covariance(model, answer_logits, batch)[1], found, 1e-7)


@layouts
@pytest.mark.parametrize("num_classes", [2, 4])
def test_centred(layout, num_classes):
    fused, model = built(layout)
    batch = toy_batch(num_classes=num_classes)

    def class_logits(m, b):
        logits, labels = answer_logits(m, b)
        return logits[:, :num_classes], labels

    posterior = LaplacePosterior(collect_factors(model, class_logits, [batch], rank=2))
    _, whole = posterior.logit_covariance(model, class_logits, batch)
    _, found = posterior.logit_covariance(model, class_logits, batch, centred=True)
    c = centring(torch.ones(5, num_classes))
    assert_close(whole, dense(fused, class_logits, batch, posterior))
    assert_close(found, c @ whole @ c)
    assert float(found.sum(1).abs().max()) < 1e-12 * float(found.abs().max()) * num_classes


@layouts
def test_ragged_classes(layout):
    fused, model = built(layout)
    batch = toy_batch()
    absent = torch.zeros(5, 4, dtype=torch.bool)
    absent[0, 0] = absent[1, 3] = True
    absent[2, :2] = absent[3, [1, 3]] = True
    batch["absent"] = absent
    posterior = LaplacePosterior(collect_factors(model, answer_logits, [batch], rank=3))
    logits, found = posterior.logit_covariance(model, answer_logits, batch)
    assert torch.equal(logits == -torch.inf, absent)
    expected = dense(fused, answer_logits, batch, posterior)
    outside = absent.unsqueeze(1) | absent.unsqueeze(2)
    assert bool((found[outside] == 0).all())
    assert_close(found, expected.masked_fill(outside, 0))
    _, centred = posterior.logit_covariance(model, answer_logits, batch, centred=True)
    c = centring(~absent)
    assert_close(centred, c @ expected @ c)


@layouts
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_every_arrangement_of_rows(layout, arrangement):
    class_logits, make_batch = ARRANGEMENTS[arrangement]
    fused, model = built(layout)
    batch = make_batch()
    posterior = LaplacePosterior(collect_factors(model, class_logits, [batch], rank=3), 0.7)
    _, found = posterior.logit_covariance(model, class_logits, batch)
    assert_close(found, dense(fused, class_logits, batch, posterior))


@layouts
def test_more_examples_than_one_digit_names(layout):
    fused, model = built(layout)
    batch = toy_batch(num_rows=40, length=4)
    posterior = LaplacePosterior(collect_factors(model, answer_logits, [batch], rank=3), 0.7)
    _, found = posterior.logit_covariance(model, answer_logits, batch)
    assert_close(found, dense(fused, answer_logits, batch, posterior))


def test_a_batch_is_its_examples():
    model, batch = toy_model(), toy_batch(num_rows=6)
    posterior = LaplacePosterior(collect_factors(model, answer_logits, [batch], rank=3))
    _, together = posterior.logit_covariance(model, answer_logits, batch)
    for sizes in ([1] * 6, [4, 2]):
        parts = [posterior.logit_covariance(model, answer_logits, part)[1] for part in split(batch, *sizes)]
        assert_close(torch.cat(parts), together)


def test_small_chunks_change_nothing(monkeypatch):
    model, batch = toy_model(), toy_batch(num_rows=6)
    posterior = LaplacePosterior(collect_factors(model, answer_logits, [batch], rank=3))
    _, whole = posterior.logit_covariance(model, answer_logits, batch)
    monkeypatch.setattr(groups, "_CHUNK_FLOATS", 1)
    assert_close(posterior.logit_covariance(model, answer_logits, batch)[1], whole, 1e-12)


@pytest.mark.parametrize("rank", [2, 16])
def test_transformers_model(rank):
    model, batch = tiny_qwen(), toy_batch()
    posterior = LaplacePosterior(collect_factors(model, answer_logits, [toy_batch(seed=5)], rank=rank), 0.5)
    _, found = posterior.logit_covariance(model, answer_logits, batch)
    assert_close(found, dense(model, answer_logits, batch, posterior), 1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.25)])
def test_narrow_models(dtype, tolerance):
    model, batch = tiny_qwen(dtype=dtype, implementation="grouped_mm"), toy_batch()
    posterior = LaplacePosterior(collect_factors(model, answer_logits, [batch], rank=16), 0.5)
    logits, found = posterior.logit_covariance(model, answer_logits, batch)
    assert logits.dtype == found.dtype == torch.float64
    wide = tiny_qwen(dtype=dtype).double()
    reference = LaplacePosterior(collect_factors(wide, answer_logits, [batch], rank=16), 0.5)
    assert_close(found, reference.logit_covariance(wide, answer_logits, batch)[1], tolerance)


def test_terms_serve_every_precision():
    model, batch = toy_model(), toy_batch()
    posterior = LaplacePosterior(collect_factors(model, answer_logits, [batch], rank=3))
    terms = posterior.batch_terms(model, answer_logits, batch)
    for precision in (0.1, 7.0, torch.tensor([0.2, 30.0])):
        other = posterior.with_prior_precision(precision)
        _, expected = other.logit_covariance(model, answer_logits, batch, centred=True)
        assert torch.equal(other.covariance_of(terms), expected)


def test_foreign_factors_are_noticed():
    """Bases that are not orthonormal make the covariance indefinite."""
    model, batch = toy_model(), toy_batch()
    factors = collect_factors(model, answer_logits, [batch], rank=FULL)
    factors.layers[0].a_basis.mul_(3)
    with pytest.raises(ValueError, match="beyond rounding error"):
        LaplacePosterior(factors, 0.01).logit_covariance(model, answer_logits, batch)


def test_the_gradients_of_a_model_are_left_alone():
    model, batch = toy_model(), toy_batch()
    posterior = LaplacePosterior(collect_factors(model, answer_logits, [batch], rank=3))
    model.train()
    posterior.predict(model, answer_logits, batch)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(m.training for m in model.modules())


@layouts
def test_groups_of_layers_change_no_bit_and_need_less_memory(monkeypatch, layout):
    """With little memory the gradients of a few layers at a time are stored."""
    _, model = built(layout)
    posterior = LaplacePosterior(collect_factors(model, answer_logits, [toy_batch(num_rows=9, seed=3)], rank=3), 2.0)
    batch = toy_batch()
    expected = posterior.logit_covariance(model, answer_logits, batch)[1]
    positions, gradients = [], Taps.gradients

    def seen(taps, logits, weights, chosen=None):
        positions.append(chosen)
        return gradients(taps, logits, weights, chosen)

    monkeypatch.setattr(covariance, "GRADIENT_BYTES", 1)
    monkeypatch.setattr(covariance, "_FEW_CONTRASTS", 1)
    monkeypatch.setattr(Taps, "gradients", seen)
    found = posterior.logit_covariance(model, answer_logits, batch)[1]
    assert torch.equal(found, expected)
    assert positions[-8:] == [[0]] * 4 + [[1]] * 4  # four classes, without the pass of the owners


def test_gradients_of_many_classes_are_bounded():
    for gradient_bytes in (1 << 20, 1 << 28, 1 << 31):
        for num_contrasts in (1, 3, 5):
            assert num_sweeps(num_contrasts, 24, gradient_bytes) == 1
        for num_contrasts in (6, 29, 99):
            count = num_sweeps(num_contrasts, 24, gradient_bytes)
            held = num_contrasts * gradient_bytes / count
            assert count == 24 or held <= max(GRADIENT_BYTES, 5 * gradient_bytes)
            assert count == 1 or num_contrasts * gradient_bytes > GRADIENT_BYTES
    assert num_sweeps(29, 24, 0) == 1
