"""What a fit says of its methods, and what it refuses of a state that was read from a file."""

from __future__ import annotations

import math

import pytest
import torch
from methods_cases import RANK3, fitted
from oracles.models import answer_logits, toy_batch, toy_model

from bmoe_lightning.curvature import collect_factors
from bmoe_lightning.laplace import LaplacePosterior
from bmoe_lightning.methods import (
    MAP,
    SWAG,
    CheckpointEnsemble,
    FitResult,
    LaplaceLPO,
    NotFittedError,
    TemperatureScaling,
)
from bmoe_lightning.methods.fit_result import FittedMethod

LPO = LaplaceLPO(curvature=RANK3)


@pytest.fixture(scope="module")
def posterior():
    return LaplacePosterior(collect_factors(toy_model(), answer_logits, [toy_batch()], rank=3))


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def read(method, state, posterior=None):
    """A fit whose state was read from a file."""
    digests = tuple(curvature.digest for curvature in method.curvatures)
    entry = FittedMethod(state, method.fit_options(), digests, file="somewhere/methods-1.safetensors")
    posteriors = dict.fromkeys(digests, posterior) if posterior else {}
    return FitResult(methods={method.name: entry}, posteriors=posteriors)


def test_options_that_differ_are_named(posterior):
    fit = fitted((LPO, {"prior_precision": double(1, 2)}), posterior=posterior)
    assert fit.differences(LPO) == []
    assert fit.is_fitted(LPO)
    other = LaplaceLPO(curvature=RANK3, scope="global")
    assert fit.differences(other) == ["scope='layer' (here 'global')"]
    with pytest.raises(NotFittedError, match="scope='layer'"):
        fit.state_of(other)
    with pytest.raises(NotFittedError, match="temperature has not been fitted"):
        fit.state_of(TemperatureScaling())
    assert fit.state_of(MAP()) == {}


def test_is_served_at_the_fitted_precision(posterior):
    fit = fitted((LPO, {"prior_precision": double(3, 4)}), posterior=posterior)
    (digest,) = fit.posteriors
    assert fit.served_posterior(digest).prior_precision.tolist() == [3, 4]
    assert fit.posteriors[digest].prior_precision.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({}, "lacks 'temperature'"),
        ({"temperature": double(1.0)}, r"shape \(1,\)"),
        ({"temperature": torch.tensor(1.0)}, "float32"),
        ({"temperature": double(1.0)[0] * math.nan}, "positive and finite"),
        ({"temperature": double(-1.0)[0]}, "positive and finite"),
        ({"temperature": double(0.0)[0]}, "positive and finite"),
        ({"temperature": double(1.0)[0], "more": torch.tensor([1.0, math.inf])}, "'more' has non-finite"),
    ],
)
def test_a_state_that_no_fit_has_is_refused_with_its_file(state, said):
    method = TemperatureScaling()
    with pytest.raises(ValueError, match=rf"somewhere/methods-1.safetensors .*{said}.*Fit it again"):
        read(method, state).state_of(method)
    good = {"temperature": double(1.5)[0]}
    assert read(method, good).state_of(method) is good


def test_one_precision_for_each_layer(posterior):
    assert read(LPO, {"prior_precision": double(1, 2)}, posterior).state_of(LPO)
    for values in (double(1, 2, 3), double(1, -2), double(math.nan, 1)):
        with pytest.raises(ValueError, match=r"methods-1.safetensors contains no valid state of laplace_lpo"):
            read(LPO, {"prior_precision": values}, posterior).state_of(LPO)


def swag_state(**changes):
    return {"seed": torch.tensor(0), "digests": torch.zeros(3, 32, dtype=torch.uint8), **changes}


def test_a_state_from_a_file_is_checked_once_for_each_method(monkeypatch):
    checked, check = [], SWAG.check_state
    monkeypatch.setattr(SWAG, "check_state", lambda self, state: (checked.append(self), check(self, state)))
    fit = read(SWAG(), swag_state())
    for method in (SWAG(), SWAG(), SWAG(num_samples=3), SWAG()):
        fit.state_of(method)
    assert checked == [SWAG(), SWAG(num_samples=3)]
    broken = read(SWAG(), swag_state(seed=torch.tensor(0.5)))
    for _ in range(2):
        with pytest.raises(ValueError, match="lacks the seed"):
            broken.state_of(SWAG())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": torch.tensor(0.5)}, "lacks the seed"),
        ({"digests": torch.zeros(6, 32, dtype=torch.uint8)}, "6 snapshots, which must be 2 to 5"),
        ({"digests": torch.zeros(1, 32, dtype=torch.uint8)}, "1 snapshots"),
        ({"digests": torch.zeros(3, 31, dtype=torch.uint8)}, "shape"),
        ({"digests": torch.zeros(3, 32)}, "uint8"),
    ],
)
def test_snapshots_of_swag_are_a_possible_number(changes, said):
    assert read(SWAG(), swag_state()).state_of(SWAG())
    with pytest.raises(ValueError, match=said):
        read(SWAG(), swag_state(**changes)).state_of(SWAG())


def test_members_are_counted():
    method = CheckpointEnsemble()
    with pytest.raises(ValueError, match="members"):
        read(method, {"members": double(0.0)[0]}).state_of(method)
