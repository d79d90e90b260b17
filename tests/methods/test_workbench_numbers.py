"""Fitting without a trainer: what the numbers of each method are."""

from __future__ import annotations

import torch
from methods_cases import RANK3
from oracles.models import answer_logits
from workbench_cases import (
    assert_stationary,
    distances,
    methods_of,
    precision,
    state,
    whole,
)

from bmoe_lightning.methods import (
    LaplaceEvidence,
    LaplaceLPO,
    fit_methods,
)


def nll(log_probs, labels):
    return float(-log_probs.gather(1, labels.unsqueeze(1)).sum())


class TestNumbers:
    def test_temperature_is_where_the_nll_is_least(self, tuned, calibration, everything):
        logits, labels = whole(tuned, calibration)
        found = float(state(everything, "temperature")["temperature"])
        least = nll((logits / found).log_softmax(-1), labels)
        for other in (found * 1.01, found / 1.01):
            assert nll((logits / other).log_softmax(-1), labels) > least
        assert 1.3 < found < 3

    def test_evidence_precision_is_stationary(self, tuned, prior_mean, everything):
        posterior = everything.posteriors[RANK3.digest]
        assert_stationary(posterior, precision(everything, "laplace_evidence"), distances(tuned, prior_mean))

    def test_evidence_with_a_prior_mean_of_zero_needs_no_weights_from_before(self, tuned, train, prior_mean):
        methods = methods_of(LaplaceEvidence, prior_mean="zero")
        fit = fit_methods(methods, tuned, answer_logits, train, None)
        assert_stationary(fit.posteriors[RANK3.digest], precision(fit, "laplace_evidence"), distances(tuned, None))
        given = fit_methods(methods, tuned, answer_logits, train, None, prior_mean=prior_mean)
        assert precision(given, "laplace_evidence") == precision(fit, "laplace_evidence")

    def test_a_global_scope_has_one_precision(self, tuned, train, calibration, prior_mean):
        methods = methods_of(LaplaceEvidence, LaplaceLPO, scope="global")
        fit = fit_methods(methods, tuned, answer_logits, train, calibration, prior_mean=prior_mean)
        assert all(len(set(precision(fit, method.name))) == 1 for method in methods)

    def test_shrunk_temperature_is_where_its_objective_is_least(self, tuned, calibration, everything):
        logits, labels = whole(tuned, calibration)

        def objective(temperature):
            penalty = (1 / temperature - 0.4) ** 2 / (2 * 0.2**2)
            return nll((logits / temperature).log_softmax(-1), labels) + penalty

        found = float(state(everything, "shrunk_temperature")["temperature"])
        assert objective(found) < min(objective(found * 1.01), objective(found / 1.01))

    def test_laplace_temperature_is_where_the_nll_is_least(self, tuned, calibration, everything):
        found = state(everything, "laplace_temperature")
        posterior = everything.posteriors[RANK3.digest].with_prior_precision(found["prior_precision"])
        log_probs = torch.cat(
            [posterior.predict(tuned, answer_logits, batch, num_samples=500) for batch in calibration]
        )
        labels = whole(tuned, calibration)[1]
        values = [
            nll((log_probs / (found["temperature"] * factor)).log_softmax(-1), labels) for factor in (1, 1.02, 1 / 1.02)
        ]
        assert values[0] == min(values)
