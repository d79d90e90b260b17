"""Scores of uncertainty of methods with a posterior, beside their predictions."""

import pytest
import torch
from methods_cases import RANK3, fitted
from oracles.models import answer_logits

from bmoe_lightning.curvature import collect_factors
from bmoe_lightning.laplace import LaplacePosterior
from bmoe_lightning.laplace.uncertainty_scores import uncertainty_scores
from bmoe_lightning.methods import MAP, LaplaceEvidence, LaplaceLPO, evaluate

NAMES = ["mutual_information", "logit_variance", "relative_variance"]
PRECISION = torch.tensor([2.0, 5.0], dtype=torch.float64)


@pytest.fixture
def fit(model, batches):
    posterior = LaplacePosterior(collect_factors(model, answer_logits, batches, rank=3), 2.0)
    state = {"prior_precision": PRECISION}
    methods = [LaplaceLPO(curvature=RANK3, num_samples=50), LaplaceEvidence(curvature=RANK3, num_samples=50), MAP()]
    states = [state, {"prior_precision": 1e6 * PRECISION}, {}]
    return methods, fitted(*zip(methods, states, strict=True), posterior=posterior)


def test_the_variance_is_relative_to_that_of_the_weights_jacobian(model, batches, fit):
    methods, fit = fit
    found = evaluate(methods, fit, model, answer_logits, batches[:1])["laplace_lpo"].uncertainty
    weights = {name: weight for name, weight in model.named_parameters() if "down_proj" in name}
    layers = [[weight for name, weight in weights.items() if f"layers.{at}." in name] for at in (0, 1)]
    logits, _ = answer_logits(model, batches[0])
    posterior = fit.posteriors[RANK3.digest]
    for row, example in enumerate(logits):
        present = [value for value in example if value > -1e9]
        prior = 0.0
        for precision, of_layer in zip(PRECISION, layers, strict=True):
            gradients = [
                torch.cat([part.flatten() for part in torch.autograd.grad(value, of_layer, retain_graph=True)])
                for value in present
            ]
            jacobian = torch.stack(gradients)
            prior = prior + jacobian @ jacobian.mT / precision
        centre = torch.eye(len(present), dtype=torch.float64) - 1 / len(present)
        of_prior = float((centre @ prior).trace()) / (len(present) - 1)
        assert float(found["logit_variance"][row]) < of_prior
        expected = float(found["logit_variance"][row]) / of_prior
        assert float(found["relative_variance"][row]) == pytest.approx(expected, rel=1e-6)
    _, covariance = posterior.with_prior_precision(PRECISION).logit_covariance(model, answer_logits, batches[0])
    alone = uncertainty_scores(torch.where(logits < -1e9, -torch.inf, logits), covariance)["logit_variance"]
    torch.testing.assert_close(found["logit_variance"], alone, rtol=1e-6, atol=1e-12)


def test_scores_are_in_the_order_of_the_data_and_do_not_depend_on_the_batches(model, batches, fit):
    methods, fit = fit
    found = evaluate(methods, fit, model, answer_logits, batches)
    alone = [evaluate(methods, fit, model, answer_logits, [batch]) for batch in batches]
    assert list(found["laplace_lpo"].uncertainty) == NAMES
    assert found["map"].uncertainty == {}
    for name in NAMES:
        scores = found["laplace_lpo"].uncertainty[name]
        assert scores.shape == (10,)
        assert scores.dtype == torch.float64
        assert bool((scores > 0).all())
        parts = torch.cat([part["laplace_lpo"].uncertainty[name] for part in alone])
        torch.testing.assert_close(scores, parts, rtol=1e-6, atol=1e-9)


def test_a_prior_without_variance_leaves_no_uncertainty_of_the_weights(model, batches, fit):
    methods, fit = fit
    found = evaluate(methods, fit, model, answer_logits, batches)
    sure, unsure = (found[name].uncertainty for name in ("laplace_evidence", "laplace_lpo"))
    for name in NAMES[:2]:
        assert bool((sure[name] < 1e-3 * unsure[name]).all())
