import pytest
import torch
from oracles.cases import built, layouts
from oracles.dense import dense_logit_covariance, experts_modules, low_rank_blocks, observe, weight_jacobians
from oracles.models import answer_logits, toy_batch, toy_model

from bmoe_lightning.curvature import collect_factors
from bmoe_lightning.laplace import Attribution, LaplacePosterior
from bmoe_lightning.laplace.attribution import attributed
from bmoe_lightning.laplace.predictive import mean_variance


def fitted(model, precision=(0.5, 3.0)):
    factors = collect_factors(model, answer_logits, [toy_batch(num_rows=9, seed=3)], rank=3)
    return LaplacePosterior(factors, torch.tensor(precision))


@layouts
def test_each_part_is_the_variance_under_the_dense_covariance_of_one_expert(layout):
    fused, model = built(layout)
    posterior, batch = fitted(model), toy_batch()
    logits = answer_logits(fused, batch)[0]
    jacobians = weight_jacobians(logits, [m.down_proj for m in experts_modules(fused)])
    blocks = [low_rank_blocks(layer) for layer in posterior.factors.layers]
    found = posterior.attribute(model, answer_logits, batch)
    for position, layer in enumerate(found.layers):
        for expert in range(layer.variance.shape[1]):
            alone = [torch.zeros_like(j) for j in jacobians]
            alone[position][:, :, expert] = jacobians[position][:, :, expert]
            covariance = dense_logit_covariance(alone, blocks, posterior.prior_precision)
            expected = mean_variance(logits.detach().double(), covariance)
            torch.testing.assert_close(layer.variance[:, expert], expected, rtol=1e-9, atol=1e-12)


def test_the_parts_add_up_to_the_variance_of_the_links():
    model, batch = toy_model(), toy_batch()
    batch["absent"] = torch.zeros(5, 4, dtype=torch.bool)
    batch["absent"][::2, 3] = batch["absent"][0, 1] = True
    posterior = fitted(model)
    found = posterior.attribute(model, answer_logits, batch)
    logits, covariance = posterior.logit_covariance(model, answer_logits, batch, centred=True)
    assert bool((logits == -torch.inf).any())
    torch.testing.assert_close(found.total, mean_variance(logits, covariance), rtol=1e-10, atol=0)
    torch.testing.assert_close(found.by_layer.sum(1), found.total)
    assert [layer.index for layer in found.layers] == [0, 1]


def test_the_slots_are_those_that_move_a_logit():
    model, batch = toy_model(), toy_batch()
    _, observed = observe(model, answer_logits, batch)
    found = fitted(model).attribute(model, answer_logits, batch)
    for layer, seen in zip(found.layers, observed, strict=True):
        expected = torch.zeros_like(layer.slots)
        for owner, expert in zip(seen.owners[seen.moves].tolist(), seen.experts[seen.moves].tolist(), strict=True):
            expected[owner, expert] += 1
        assert torch.equal(layer.slots, expected)
        assert bool(((layer.variance != 0) == (layer.slots > 0)).all())


def test_batches_are_joined():
    model, posterior = toy_model(), fitted(toy_model())
    parts = [posterior.attribute(model, answer_logits, toy_batch(seed=seed)) for seed in (0, 1)]
    joined = Attribution.joined(parts)
    assert torch.equal(joined.total, torch.cat([part.total for part in parts]))
    assert torch.equal(joined.layers[1].slots, torch.cat([part.layers[1].slots for part in parts]))


def test_sums_over_experts_cannot_be_attributed():
    model, posterior = toy_model(), fitted(toy_model())
    terms = posterior.batch_terms(model, answer_logits, toy_batch())
    with pytest.raises(ValueError, match="by_group=True"):
        attributed(terms, posterior.factors.layers, posterior.prior_precision)
