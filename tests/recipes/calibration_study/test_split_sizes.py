"""The regret of methods by size of the calibration split, from what is stored of a case."""

from __future__ import annotations

import pytest
import torch
from study_cases import case, measured_in

from bmoe_lightning.laplace.predictive import class_probabilities
from bmoe_lightning.laplace.prior import fit_lpo
from bmoe_lightning.methods import get_method, method_names
from bmoe_lightning.methods.temperature_search import fit_temperature
from recipes.calibration_study.cases import CURVATURE
from recipes.calibration_study.split_sizes import measurable, split_regrets


def methods(*names):
    return [get_method(name).with_defaults(CURVATURE) for name in names]


def loss(log_probs, labels):
    return float(torch.nn.functional.nll_loss(log_probs, labels))


def test_methods_that_need_more_than_what_is_stored_are_not_measurable():
    found = {name for name in method_names() if measurable(get_method(name).with_defaults(CURVATURE))}
    assert {"map", "temperature", "laplace_evidence", "laplace_lpo", "evidence_temperature"} <= found
    more = {"mc_dropout", "checkpoint_ensemble", "deep_ensemble", "swag", "laplace_last_layer", "isotropic"}
    assert not found & {*more, "router_noise"}


def test_the_reference_has_no_regret_and_the_other_one_has_some(tmp_path):
    (made,) = [case(temperature=3.0)]
    plain, scaled = split_regrets([made], methods("map", "temperature"), (), 1, tmp_path)
    assert scaled.value == pytest.approx(0, abs=1e-9)
    at_map = loss(made.test.logits.log_softmax(-1), made.test.labels)
    temperature = fit_temperature(made.calibration.logits, made.calibration.labels)
    at_best = loss((made.test.logits / temperature).log_softmax(-1), made.test.labels)
    assert plain.value == pytest.approx(1000 * (at_map - at_best))


def test_a_posterior_is_fitted_on_the_part_and_predicts_the_test_questions(tmp_path):
    made = case()
    (method,) = methods("laplace_lpo")
    method = type(method)(curvature=CURVATURE, scope="global", num_samples=200)
    (regret, _) = split_regrets([made], [method], (40,), 1, tmp_path)
    chosen = torch.randperm(120, generator=torch.Generator().manual_seed(40))[:40]
    part = made.calibration.select(chosen)
    precision = fit_lpo(part.cache, "global", seed=0)
    log_probs = class_probabilities(made.test.logits, made.test.cache.covariance(precision), num_samples=200, seed=0)
    temperature = fit_temperature(part.logits, part.labels)
    reference = min(loss((made.test.logits / scale).log_softmax(-1), made.test.labels) for scale in (1.0, temperature))
    assert regret.size == 40
    assert regret.value == pytest.approx(1000 * (loss(log_probs, made.test.labels) - reference), abs=1e-6)


def test_a_split_that_a_method_refuses_has_no_number(tmp_path):
    regrets = split_regrets([case()], methods("evidence_temperature"), (32,), 1, tmp_path)
    assert [regret.value is None for regret in regrets] == [True, False]


def test_finished_measurements_are_not_repeated(tmp_path, monkeypatch):
    made = [case(), case(kind="fails to learn")]
    first = split_regrets(made, methods("temperature"), (32,), 2, tmp_path)
    assert len(measured_in(tmp_path)) == 2
    monkeypatch.setattr("recipes.calibration_study.split_sizes._regret", None)
    assert split_regrets(made, methods("temperature"), (32,), 2, tmp_path) == first


def test_sizes_beyond_the_data_are_left_out(tmp_path):
    found = split_regrets([case()], methods("map"), (64, 120, 500), 1, tmp_path)
    assert [regret.size for regret in found] == [64, None]
