"""The control for curvature."""

from dataclasses import replace

import pytest
import torch
from methods_cases import RANK3
from oracles.models import answer_logits, split, toy_batch, toy_model

from bmoe_lightning.curvature import Curvature, collect_factors
from bmoe_lightning.curvature.kfac import prior_factors
from bmoe_lightning.experts import find_expert_layers
from bmoe_lightning.laplace import LaplacePosterior
from bmoe_lightning.laplace.predictive import class_probabilities
from bmoe_lightning.methods import Isotropic, LaplaceLPO, evaluate, fit_methods
from bmoe_lightning.methods.isotropic import largest_variance
from bmoe_lightning.utils.fit_warnings import FitWarning

BATCHES = split(toy_batch(num_rows=60, seed=3), 20, 20, 20)


class Untouchable:
    def __iter__(self):
        raise AssertionError("an isotropic covariance needs no curvature pass")


def jacobian_products(model, batch):
    """`J J^T` of every example over all second weights, from autograd: `[B, K, K]`."""
    layers = find_expert_layers(model)
    weights = [model.get_parameter(f"{layer.name}.{layer.down_proj}") for layer in layers]
    logits = answer_logits(model, batch)[0]
    rows = [
        [torch.cat([g.flatten() for g in torch.autograd.grad(value, weights, retain_graph=True)]) for value in example]
        for example in torch.where(logits == -torch.inf, logits.nan_to_num(neginf=0) * 0, logits)
    ]
    jacobian = torch.stack([torch.stack(example) for example in rows])
    return jacobian @ jacobian.mT


def test_covariance_is_sigma_squared_jacobian_products_without_a_curvature_pass():
    model, batch = toy_model(), toy_batch(num_rows=3)
    method = Isotropic(curvature=RANK3)
    fit = fit_methods([method], model, answer_logits, Untouchable(), BATCHES)
    assert fit.posteriors == {}
    sigma = method.hyperparameters(fit.state_of(method))["sigma"]
    posteriors = fit.posteriors_for(method.curvatures, model)
    (posterior,) = posteriors.values()
    posterior = posterior.with_prior_precision(sigma**-2)
    logits, covariance = posterior.logit_covariance(model, answer_logits, batch)
    torch.testing.assert_close(covariance, sigma**2 * jacobian_products(model, batch), rtol=1e-9, atol=1e-12)
    found = evaluate([method], fit, model, answer_logits, [batch])["isotropic"].log_probs
    centred = posterior.logit_covariance(model, answer_logits, batch, centred=True)[1]
    torch.testing.assert_close(found, class_probabilities(logits, centred), rtol=1e-9, atol=1e-12)


def test_shares_the_forward_with_a_posterior_over_the_same_layers():
    model, calls = toy_model(), []

    def counted(model, batch):
        calls.append(batch)
        return answer_logits(model, batch)

    methods = [LaplaceLPO(curvature=RANK3), Isotropic(curvature=RANK3)]
    fit = fit_methods(methods, model, counted, BATCHES, BATCHES)
    # One batch is checked before the passes, and the first of the curvature's run again for its share of the gradient.
    before = 1 + 2 * len(BATCHES) + min(len(BATCHES), 4)
    assert len(calls) == before
    evaluate(methods, fit, model, counted, BATCHES)
    assert len(calls) == before + len(BATCHES)


def test_labels_choose_sigma_by_validation_nll():
    model = toy_model()
    method = Isotropic(curvature=RANK3)
    fit = fit_methods([method], model, answer_logits, [], BATCHES)
    factors = collect_factors(model, answer_logits, BATCHES, rank=3)
    none = LaplacePosterior(factors).with_prior_precision(1.0)
    found = fit.state_of(method)["prior_precision"]
    assert len(set(found.tolist())) == 1
    assert found.shape == none.prior_precision.shape


@pytest.mark.parametrize("tolerance", [0.003, 0.1])
def test_without_labels_the_nll_of_the_model_s_own_labels_changes_by_the_tolerance(tolerance):
    model = toy_model()
    method = Isotropic(curvature=RANK3, use_labels=False, tolerance=tolerance)
    bare = [{name: value for name, value in batch.items() if name != "labels"} for batch in BATCHES]
    fit = fit_methods([method], model, answer_logits, Untouchable(), bare)
    with torch.no_grad():
        logits = torch.cat([answer_logits(model, batch)[0] for batch in BATCHES]).double()
    predicted = logits.argmax(1, keepdim=True)
    plain = float(-logits.log_softmax(-1).gather(1, predicted).mean())

    def change(variance):
        (posterior,) = fit.posteriors_for(method.curvatures, model).values()
        parts = [
            posterior.with_prior_precision(1 / variance).predict(model, answer_logits, batch, num_samples=1000)
            for batch in BATCHES
        ]
        return abs(float(-torch.cat(parts).gather(1, predicted).mean()) - plain) / plain

    variance = 1 / float(fit.state_of(method)["prior_precision"][0])
    assert change(variance) == pytest.approx(tolerance, rel=1e-3)
    assert change(variance * 1.05) > tolerance


def test_a_model_that_is_sure_beyond_the_rule_is_refused():
    model = toy_model()
    method = Isotropic(curvature=RANK3, use_labels=False)
    sure = [{**batch} for batch in BATCHES]

    def class_logits(model, batch):
        logits, labels = answer_logits(model, batch)
        return logits + 1e7 * (logits - logits.detach()).nan_to_num(), labels

    with pytest.raises(ValueError, match=r"too confident for this rule.*use_labels=True"):
        fit_methods([method], model, class_logits, [], sure)


def test_needs_and_options():
    assert Isotropic().needs.calibration_labels
    assert not Isotropic(use_labels=False).needs.calibration_labels
    assert Isotropic(use_labels=False).needs.calibration
    assert Isotropic(curvature=Curvature(rank=7, fisher="mc")).curvatures == (Curvature(rank=0),)
    with pytest.raises(ValueError, match="tolerance must be a positive number"):
        Isotropic(tolerance=0)
    with pytest.raises(ValueError, match="unknown link"):
        Isotropic(link="logit")
    assert callable(largest_variance)


def test_a_variance_at_the_end_of_its_search_is_said():
    posterior = LaplacePosterior(prior_factors(toy_model(), find_expert_layers(toy_model())))
    cache = posterior.validation_cache(toy_model(), answer_logits, BATCHES)
    still = replace(cache, prior=1e-12 * cache.prior)
    with pytest.warns(FitWarning, match=r"sigma\^2 is at the end of its search range \(1e\+04\)"):
        assert largest_variance(still, 0.003) == pytest.approx(1e4)
