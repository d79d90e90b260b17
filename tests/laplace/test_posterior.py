import gc
import weakref
from dataclasses import replace

import pytest
import torch
from oracles.dense import dense_log_det, low_rank_blocks
from oracles.models import answer_logits, as_modules, split, tiny_qwen, toy_batch, toy_model
from torch import nn

from bmoe_lightning.curvature import collect_factors
from bmoe_lightning.experts import down_proj_parameters, find_expert_layers, squared_distances
from bmoe_lightning.laplace import LaplacePosterior, Prediction, WeightMismatchError, slot_terms
from bmoe_lightning.laplace.posterior import posterior_terms
from bmoe_lightning.laplace.predictive import (
    class_probabilities,
    mean_variance,
    monte_carlo,
    temperature_from_variances,
)

layouts = pytest.mark.parametrize("layout", ["fused", "modules"])


def fit(model, rank=3, **options):
    return LaplacePosterior(collect_factors(model, answer_logits, [toy_batch(seed=3)], rank=rank, **options))


@pytest.mark.parametrize("rank", [2, 100])
def test_log_det_against_slogdet(rank):
    posterior = fit(toy_model(idle=[2]), rank).with_prior_precision(torch.tensor([0.3, 20.0]))
    blocks = [low_rank_blocks(layer) for layer in posterior.factors.layers]
    expected = dense_log_det(blocks, posterior.prior_precision.tolist())
    assert float(posterior.log_det()) == pytest.approx(expected, rel=1e-10)
    assert posterior.log_det().dtype == torch.float64


def test_evidence_against_dense_determinants():
    """`log p(D | W*) + log p(W* | lambda) - 1/2 log det`, every term of it, up to the constants in pi that cancel."""
    model = toy_model()
    layers = find_expert_layers(model)
    reference = {n: torch.randn_like(p) for layer in layers for n, p in down_proj_parameters(model, layer).items()}
    distances = squared_distances(model, layers, reference)
    posterior = fit(model).with_prior_precision(torch.tensor([0.3, 20.0]))
    blocks = [low_rank_blocks(layer) for layer in posterior.factors.layers]
    log_prior = 0.0
    for layer, precision in zip(layers, (0.3, 20.0), strict=True):
        for name, weight in down_proj_parameters(model, layer).items():
            gap = (weight.detach() - reference[name]).flatten()
            log_prior += 0.5 * len(gap) * float(torch.tensor(precision).log()) - 0.5 * precision * float(gap @ gap)
    expected = -12.5 + log_prior - 0.5 * dense_log_det(blocks, [0.3, 20.0])
    assert float(posterior.log_marginal_likelihood(-12.5, distances)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_prior_from_the_evidence(scope):
    model = toy_model()
    distances = squared_distances(model, find_expert_layers(model), None)
    posterior = fit(model)
    best = posterior.fit_prior_evidence(distances, scope)
    assert (float(best.prior_precision.std()) == 0) == (scope == "global")
    highest = float(best.log_marginal_likelihood(0.0, distances))
    for factor in (0.5, 0.99, 1.01, 2.0):
        other = best.with_prior_precision(best.prior_precision * factor)
        assert float(other.log_marginal_likelihood(0.0, distances)) < highest
    assert posterior.prior_precision.tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match="equal the prior mean"):
        posterior.fit_prior_evidence([torch.zeros(4), torch.zeros(4)], scope)


def test_predict_is_the_link_of_the_covariance():
    model, batch = toy_model(), toy_batch()
    posterior = fit(model).with_prior_precision(0.5)
    pair = posterior.logit_covariance(model, answer_logits, batch, centred=True)
    for link in ("mc", "isotropic", "probit", "laplace_bridge"):
        found = posterior.predict(model, answer_logits, batch, link, num_samples=500, seed=3)
        assert torch.equal(found, class_probabilities(*pair, link, num_samples=500, seed=3))
    whole = posterior.logit_covariance(model, answer_logits, batch)
    difference = (
        monte_carlo(*whole, 100_000).exp() - posterior.predict(model, answer_logits, batch, num_samples=100_000).exp()
    )
    assert float(difference.abs().max()) < 0.015
    with pytest.raises(ValueError, match="unknown link"):
        posterior.predict(model, answer_logits, batch, "sigmoid")


def test_prediction_with_uncertainty():
    model, batch = toy_model(), toy_batch()
    posterior = fit(model)
    found = posterior.predict_with_uncertainty(model, answer_logits, batch, num_samples=300, seed=1)
    assert isinstance(found, Prediction)
    assert torch.equal(found.log_probs, posterior.predict(model, answer_logits, batch, num_samples=300, seed=1))
    assert found.covariance.shape == (5, 4, 4)
    assert bool((found.mutual_information > 0).all())


def test_works_in_inference_mode_as_lightning_uses_it():
    model, batch = toy_model(), toy_batch()
    posterior = fit(model)
    expected = posterior.predict(model, answer_logits, batch, num_samples=50)
    with torch.inference_mode():
        assert torch.equal(posterior.predict(model, answer_logits, toy_batch(), num_samples=50), expected)
        inside = fit(model)
    torch.testing.assert_close(inside.log_det(), posterior.log_det())
    torch.testing.assert_close(inside.predict(model, answer_logits, batch, num_samples=50), expected)


def test_precision_is_checked():
    posterior = fit(toy_model())
    names = [layer.name for layer in posterior.factors.layers]
    assert posterior.with_prior_precision(dict.fromkeys(names, 3)).prior_precision.tolist() == [3, 3]
    assert posterior.with_prior_precision(torch.tensor(2)).prior_precision.tolist() == [2, 2]
    for bad in (0.0, -1.0, float("nan"), float("inf"), torch.tensor([1.0, 0.0])):
        with pytest.raises(ValueError, match="must be positive and finite"):
            posterior.with_prior_precision(bad)
    with pytest.raises(ValueError, match=r"2 layers need one prior precision each, got shape \(3,\)"):
        posterior.with_prior_precision(torch.ones(3))
    with pytest.raises(ValueError, match=r"no prior precision for the layers \['layers.1.mixture.crew'\]"):
        posterior.with_prior_precision({names[0]: 1.0})


def test_leaving_layers_out():
    model, batch = toy_model(num_layers=3), toy_batch()
    posterior = fit(model).with_prior_precision(torch.tensor([0.5, 2.0, 8.0]))
    parts = [posterior.without_layers([i for i in range(3) if i != kept]) for kept in range(3)]
    assert [part.prior_precision.tolist() for part in parts] == [[0.5], [2.0], [8.0]]
    covariances = [part.logit_covariance(model, answer_logits, batch)[1] for part in parts]
    _, whole = posterior.logit_covariance(model, answer_logits, batch)
    torch.testing.assert_close(sum(covariances), whole, rtol=1e-10, atol=1e-12)
    _, two = posterior.without_layers([1]).logit_covariance(model, answer_logits, batch)
    torch.testing.assert_close(two, covariances[0] + covariances[2], rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="no expert layer has the index"):
        posterior.without_layers([5])
    with pytest.raises(ValueError, match="leaves no posterior"):
        posterior.without_layers([0, 1, 2])


@layouts
def test_curvature_of_chosen_layers_predicts(layout):
    """`collect_factors(layers=...)` is another way to leave layers out."""
    model = toy_model(num_layers=3) if layout == "fused" else as_modules(toy_model(num_layers=3))
    batch, layers = toy_batch(), find_expert_layers(model)
    chosen = fit(model, layers=layers[1:])
    _, found = chosen.logit_covariance(model, answer_logits, batch)
    _, expected = fit(model).without_layers([0]).logit_covariance(model, answer_logits, batch)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_layers_named_by_the_user_predict(tmp_path):
    """Square experts, whose second layer only the user can name, also after a round trip through a file."""
    model = as_modules(toy_model(width=5, inner=5))
    with pytest.raises(ValueError, match="do not tell which one is down_proj"):
        find_expert_layers(model)
    layers = find_expert_layers(model, experts="*.crew", down_proj="fall")
    posterior, batch = fit(model, layers=layers), toy_batch()
    _, found = posterior.logit_covariance(model, answer_logits, batch)
    fused = toy_model(width=5, inner=5)
    _, expected = fit(fused).logit_covariance(fused, answer_logits, batch)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    posterior.save(tmp_path / "p.safetensors")
    loaded = LaplacePosterior.load(tmp_path / "p.safetensors")
    torch.testing.assert_close(loaded.logit_covariance(model, answer_logits, batch)[1], found)


class Wrapped(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model


def wrapped_logits(module, batch):
    return answer_logits(module.model, batch)


@pytest.mark.parametrize("build", [toy_model, tiny_qwen, lambda: as_modules(toy_model())])
def test_inside_a_wrapper_and_outside(build, tmp_path):
    model, batch = build(), toy_batch()
    factors = collect_factors(Wrapped(model), wrapped_logits, [toy_batch(seed=3)], rank=3)
    assert factors.layers[0].name.startswith("model.")
    inside = LaplacePosterior(factors)
    _, expected = inside.logit_covariance(Wrapped(model), wrapped_logits, batch)
    inside.save(tmp_path / "p.safetensors")
    loaded = LaplacePosterior.load(tmp_path / "p.safetensors")
    twice = fit(model).logit_covariance(Wrapped(Wrapped(model)), lambda m, b: wrapped_logits(m.model, b), batch)
    for _, found in (
        inside.logit_covariance(model, answer_logits, batch),
        loaded.logit_covariance(model, answer_logits, batch),
        twice,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_other_weights_are_refused():
    posterior, batch = fit(toy_model()), toy_batch()
    other = toy_model(seed=1)
    for use in (
        lambda: posterior.check_weights(other),
        lambda: posterior.logit_covariance(other, answer_logits, batch),
        lambda: posterior.predict(other, answer_logits, batch),
        lambda: posterior.fit_prior_lpo(other, answer_logits, [batch]),
    ):
        with pytest.raises(WeightMismatchError, match="fitted to other weights"):
            use()
    posterior.check_weights(toy_model())


@layouts
def test_weights_that_change_after_a_prediction_are_refused(layout):
    """The check is not done once for all: a model may be trained on, or get another checkpoint."""
    model, batch = toy_model() if layout == "fused" else as_modules(toy_model()), toy_batch()
    posterior = fit(model)
    before = posterior.logit_covariance(model, answer_logits, batch)[1]
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    weights = [p for layer in find_expert_layers(model) for p in down_proj_parameters(model, layer).values()]
    optimiser = torch.optim.AdamW(weights, lr=1e-3)
    answer_logits(model, batch)[0].square().sum().backward()
    optimiser.step()
    with pytest.raises(WeightMismatchError):
        posterior.predict(model, answer_logits, batch)
    model.load_state_dict(kept)
    assert torch.equal(posterior.logit_covariance(model, answer_logits, batch)[1], before)
    model.load_state_dict({name: value + 1e-3 for name, value in kept.items()}, assign=True)
    with pytest.raises(WeightMismatchError):
        posterior.predict(model, answer_logits, batch)


def test_a_posterior_keeps_no_model_alive():
    model, batch = toy_model(), toy_batch()
    posterior = fit(model)
    posterior.predict(model, answer_logits, batch, "probit")
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_weights_are_read_once_a_model(monkeypatch):
    from bmoe_lightning.laplace import posterior as module

    reads = []
    original = module.same_weights
    monkeypatch.setattr(module, "same_weights", lambda *args: reads.append(1) or original(*args))
    model = toy_model()
    posterior = fit(model)
    for batch in split(toy_batch(num_rows=6), 2, 2, 2):
        posterior.predict(model, answer_logits, batch, "probit")
    assert len(reads) == 1


def test_a_model_of_another_shape_is_refused():
    posterior = fit(toy_model())
    for other in (toy_model(width=8), toy_model(num_experts=5), toy_model(num_layers=1)):
        with pytest.raises((ValueError, WeightMismatchError), match=r"does not fit|other weights|no expert layer"):
            posterior.predict(other, answer_logits, toy_batch())
    with pytest.raises(ValueError, match="expert layer"):
        posterior.predict(nn.Linear(2, 2), answer_logits, toy_batch())


def test_a_wider_prior_gives_a_higher_evidence_temperature():
    model, batch = toy_model(), toy_batch(num_rows=100)
    weak, strong = (
        temperature_from_variances(
            mean_variance(*fit(model).with_prior_precision(precision).logit_covariance(model, answer_logits, batch))
        )
        for precision in (0.1, 1e9)
    )
    assert weak > 1.2
    assert strong == pytest.approx(1.0, abs=1e-6)
    with pytest.raises(ValueError, match="at least 100 unlabelled inputs, got 99"):
        temperature_from_variances(torch.ones(99))


@layouts
@pytest.mark.parametrize("precision", [10.0, 1e-6])
def test_factors_in_half_precision(layout, precision):
    """Little is lost, whether the data explain little of the prior's variance or nearly all of it."""
    model = toy_model(width=32, inner=24).float()
    model = model if layout == "fused" else as_modules(model)
    posterior = fit(model, rank=10)
    half = LaplacePosterior(posterior.factors.to(dtype=torch.bfloat16), precision)
    batch = toy_batch(num_rows=12, seed=4)
    found, expected = (
        p.logit_covariance(model, answer_logits, batch)[1]
        for p in (half, LaplacePosterior(posterior.factors, precision))
    )
    error = float((found - expected).norm() / expected.norm())
    print(f"relative error of the covariance with bfloat16 bases: {error:.1e}")
    assert error < 1e-3
    assert torch.equal(half.log_det(), LaplacePosterior(posterior.factors, precision).log_det())


def test_half_precision_never_explains_more_than_the_prior(monkeypatch):
    """Bases of all directions, and data that determine all of them: what is left is zero, and never less."""
    model = toy_model().float()
    batch = toy_batch(num_rows=12, seed=4)
    factors = collect_factors(model, answer_logits, [batch], rank=100)
    # As if every direction had been seen.
    layers = [
        replace(
            x,
            a_eigenvalues=torch.ones_like(x.a_eigenvalues),
            slots=torch.ones_like(x.slots),
            g_eigenvalues=torch.ones_like(x.g_eigenvalues),
        )
        for x in factors.layers
    ]
    half = replace(factors, layers=tuple(layers)).to(dtype=torch.bfloat16)
    LaplacePosterior(half, 1e-6).logit_covariance(model, answer_logits, batch)
    monkeypatch.setattr(slot_terms, "orthonormal", lambda basis, dtype: basis.to(dtype))
    with pytest.raises(ValueError, match="eigenvalue of -"):
        LaplacePosterior(half, 1e-6).logit_covariance(model, answer_logits, batch)


def test_offloading_is_kept(tmp_path):
    posterior = LaplacePosterior(fit(toy_model()).factors, offload=True)
    posterior.save(tmp_path / "p.safetensors")
    for other in (
        posterior.with_prior_precision(2.0),
        posterior.without_layers([0]),
        LaplacePosterior.load(tmp_path / "p.safetensors", offload=True),
    ):
        assert other.offload
    assert not LaplacePosterior.load(tmp_path / "p.safetensors").offload


class TestPartsOfOnePosterior:
    def test_their_layers_are_computed_once(self, monkeypatch):
        model, batch = toy_model(), toy_batch()
        whole = fit(model).with_prior_precision(torch.tensor([0.5, 2.0]))
        parts = [whole.without_layers([1]), whole.without_layers([0]), whole]
        calls, compute = [], slot_terms.layer_terms
        monkeypatch.setattr(slot_terms, "layer_terms", lambda *a, **k: calls.append(len(a[3])) or compute(*a, **k))
        terms = posterior_terms(parts, model, answer_logits, batch)
        assert calls == [1, 1]
        assert terms[0].layers[0].projections is terms[2].layers[0].projections
        first, second, both = (part.covariance_of(t) for part, t in zip(parts, terms, strict=True))
        torch.testing.assert_close(first + second, both, rtol=1e-10, atol=1e-12)

    def test_other_factors_of_the_same_layers_are_computed_too(self):
        model, batch = toy_model(), toy_batch()
        pair = [fit(model, 3), fit(model, 2)]
        found = posterior_terms(pair, model, answer_logits, batch)
        for posterior, terms in zip(pair, found, strict=True):
            alone = posterior.batch_terms(model, answer_logits, batch)
            torch.testing.assert_close(posterior.covariance_of(terms), posterior.covariance_of(alone))
