"""Absent classes, however they are marked: `-inf`, a finite mask, or columns that a batch does not have."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from methods_cases import RANK3
from oracles.models import answer_logits, split, toy_batch, toy_model

from bmoe_lightning.methods import (
    MAP,
    EvidenceTemperature,
    Isotropic,
    LaplaceEvidence,
    LaplaceLPO,
    LaplaceTemperature,
    MCDropout,
    TemperatureScaling,
    evaluate,
    fit_methods,
)
from bmoe_lightning.metrics import calibration_values

METHODS = tuple(
    method.with_defaults(RANK3)
    for method in (
        MAP(),
        TemperatureScaling(),
        EvidenceTemperature(prior_mean="zero"),
        LaplaceLPO(num_samples=20_000),
        LaplaceLPO(name="probit", label="probit", link="probit"),
        LaplaceLPO(name="bridge", label="bridge", link="laplace_bridge"),
        Isotropic(link="probit"),
        MCDropout(num_samples=2),
    )
)


def ragged(num_rows, seed, *sizes):
    """Batches of which some have no example with a fourth class."""
    batch = toy_batch(num_rows=num_rows, seed=seed)
    absent = torch.zeros(num_rows, 4, dtype=torch.bool)
    absent[::3, 3] = True
    absent[: sizes[0], 3] = True
    batch["labels"] = torch.where(absent[:, 3], batch["labels"] % 3, batch["labels"])
    return split({**batch, "absent": absent}, *sizes)


def masked_with(value):
    def class_logits(model, batch):
        logits, labels = answer_logits(model, batch)
        return logits.masked_fill(batch["absent"], value), labels

    return class_logits


def cut(model, batch):
    """As wide as the batch's longest question."""
    logits, labels = answer_logits(model, batch)
    return logits[:, : int((~batch["absent"]).sum(1).max())], labels


def run(class_logits):
    """The states of all methods, and predictions of another split."""
    model = toy_model()
    fit = fit_methods(METHODS, model, class_logits, ragged(24, 3, 8, 16), ragged(110, 4, 40, 40, 30))
    states = {f"{n}/{k}": v for n, fitted in fit.methods.items() for k, v in fitted.state.items()}
    found = evaluate(METHODS, fit, model, class_logits, ragged(30, 5, 10, 20))
    return states, {name: predictions.log_probs for name, predictions in found.items()}, found


@pytest.fixture(scope="module")
def expected():
    return run(answer_logits)


@pytest.mark.parametrize("value", [torch.finfo(torch.float64).min, torch.finfo(torch.float16).min, -1e9, -1e4])
def test_a_finite_mask_is_the_infinite_one(expected, value):
    states, log_probs, found = run(masked_with(value))
    for (name, one), other in zip(states.items(), expected[0].values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0, msg=name)
    for name, one in log_probs.items():
        torch.testing.assert_close(one, expected[1][name], rtol=1e-12, atol=1e-12, msg=name)
        ours, theirs = found[name], expected[2][name]
        assert calibration_values(one, ours.labels) == calibration_values(theirs.log_probs, theirs.labels)


def test_batches_of_their_own_width(expected):
    """K of a batch is that of its longest question: the missing columns are absent classes."""
    states, log_probs, _ = run(cut)
    for (name, one), other in zip(states.items(), expected[0].values(), strict=True):
        # Sums in another order end a search for a precision some rounding away.
        torch.testing.assert_close(one, other, rtol=1e-5, atol=0, msg=name)
    for name, one in log_probs.items():
        torch.testing.assert_close(one, expected[1][name], rtol=1e-5, atol=1e-5, msg=name)


SAMPLED = tuple(
    method.with_defaults(RANK3)
    for method in (
        LaplaceLPO(num_samples=1001),
        LaplaceEvidence(prior_mean="zero", num_samples=1000, curvature=replace(RANK3, fisher="mc")),
        LaplaceTemperature(prior_mean="zero", num_samples=1000),
        Isotropic(num_samples=1000),
        Isotropic(name="unlabelled", label="Unlabelled", use_labels=False, tolerance=0.1, num_samples=1000),
        LaplaceEvidence(name="variance", label="Variance", prior_mean="zero", link="isotropic", num_samples=1000),
    )
)


@pytest.mark.parametrize("classes", [(0, 1, 2, 3), (2, 3, 4, 5), (0, 2, 5, 8)], ids=["behind", "before", "between"])
def test_columns_that_no_example_has_change_nothing(classes):
    """Neither what is fitted nor what is predicted by a method that samples, in training, calibration or test."""

    def wide(model, batch):
        logits, labels = answer_logits(model, batch)
        columns = torch.tensor(classes)
        return logits.new_full((len(logits), 9), -torch.inf).index_copy(1, columns, logits), columns[labels]

    found = []
    for class_logits in (answer_logits, wide):
        model = toy_model()
        fit = fit_methods(SAMPLED, model, class_logits, ragged(24, 3, 8, 16), ragged(60, 4, 40, 20))
        states = {f"{n}/{k}": v for n, fitted in fit.methods.items() for k, v in fitted.state.items()}
        predicted = evaluate(SAMPLED, fit, model, class_logits, ragged(12, 5, 4, 8))
        found.append((states, {name: predictions.log_probs for name, predictions in predicted.items()}))
    (states, log_probs), (of_wide, wide_log_probs) = found
    for name, state in states.items():
        torch.testing.assert_close(of_wide[name], state, rtol=1e-6, atol=0, msg=name)
    for name, expected in log_probs.items():
        torch.testing.assert_close(wide_log_probs[name][:, list(classes)], expected, rtol=0, atol=1e-6, msg=name)


def test_another_k_in_fit_and_test():
    """All questions of the fit have three choices, some of the test four."""
    model = toy_model()
    fit = fit_methods(METHODS, model, cut, ragged(8, 3, 8), ragged(104, 4, 104))
    found = evaluate(METHODS, fit, model, cut, ragged(30, 5, 10, 20))
    for name, predictions in found.items():
        assert predictions.log_probs.shape == (30, 4), name
        torch.testing.assert_close(predictions.log_probs.exp().sum(1), torch.ones(30, dtype=torch.float64))
