"""Prior precisions that LPO leaves at an end of the range, or that the labels do not determine."""

import math
import re
import warnings
from dataclasses import replace

import pytest
import torch

from bmoe_lightning.laplace.prior import LogNormalPrior, _Objective, _warn_of_lpo, fit_lpo
from bmoe_lightning.utils.fit_warnings import FitWarning


def test_lpo_at_an_end_or_on_a_flat_objective_is_said(cache):
    right = replace(cache, logits=20 * cache.logits, labels=cache.logits.argmax(1))
    with pytest.warns(FitWarning, match="LPO.*(limit of its search range|not determined by the 90 labels)"):
        found = fit_lpo(right, "global", num_samples=50)
    flat = replace(cache, prior=0 * cache.prior, binned=0 * cache.binned)
    with pytest.warns(FitWarning, match="LPO.*(limit of its search range|not determined by the 90 labels)"):
        fit_lpo(flat, "layer", num_samples=50)
    assert bool((found.isfinite() & (found > 0)).all())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit_lpo(cache, "global", num_samples=50)


class Valley:
    """An objective of which the summed NLL is a parabola in each log precision."""

    num_examples = 90

    def __init__(self, *steepness):
        self.steepness = torch.tensor(steepness, dtype=torch.float64)
        self.calls = 0

    def __call__(self, log_precision):
        self.calls += 1
        return (self.steepness * log_precision.square()).sum() / self.num_examples


def warnings_at(valley, *log_precision, by_layer=True, names=()):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        at = torch.tensor(log_precision, dtype=torch.float64)
        _warn_of_lpo(valley, at, float(valley(at)), names, by_layer=by_layer)
    assert all(warning.category is FitWarning for warning in caught)
    return [str(warning.message) for warning in caught]


def test_one_layer_at_an_end_is_named():
    lowest, highest = math.log(1e-4), math.log(1e8)
    for ends, effect in (
        ((0.0, highest), r"(prior precision 1e+08 in layer 1): no finite prior precision is optimal on this validation "
                         "set, so the posterior of these layers adds no uncertainty; add labels"),
        ((lowest, 0.0), "of these layers makes predictions nearly uniform; add labels"),
        ((lowest, highest), "adds no uncertainty or makes predictions nearly uniform; add labels"),
    ):  # fmt: skip
        (sentence,) = warnings_at(Valley(1, 1), *ends)
        assert sentence.startswith("LPO ended at the limit of its search range")
        assert sentence.endswith(effect)
    assert warnings_at(Valley(1, 1), 0.0, 0.0) == []
    (sentence,) = warnings_at(Valley(1, 1), 0.0, highest, names=("model.layers.1.mlp", "model.layers.3.mlp"))
    assert "(prior precision 1e+08 in layer model.layers.3.mlp)" in sentence


def test_a_single_precision_at_an_end_is_listed_once():
    (sentence,) = warnings_at(Valley(1, 1), *[math.log(1e8)] * 2, by_layer=False, names=("a", "b"))
    assert "(prior precision 1e+08): no finite" in sentence
    assert warnings_at(Valley(1, 1), 0.0, 0.0, by_layer=False) == []


class TestFlatLayers:
    """The objective hardly depends on the precision of some layers, and well on that of the others."""

    SAID = "LPO's prior precision of some layers is not determined by the 90 labels ({}): one ten times as large or as "

    def test_they_are_named_and_no_others(self):
        (sentence,) = warnings_at(Valley(1, 0.018, 0.02, 0), 0.0, 0.0, 0.0, math.log(3e4))
        assert sentence.startswith(self.SAID.format("1 in layer 1, 3e+04 in layer 3"))
        assert sentence.endswith("add labels, or use scope='global'")
        assert warnings_at(Valley(1, 0.02, 0.02, 1), 0.0, 0.0, 0.0, 0.0) == []

    def test_a_precision_that_one_side_determines_is_not_named(self):
        def cliff(log_precision):
            return (log_precision[0].square() + (1 - log_precision[1]).clamp(min=0)) / 90

        cliff.num_examples = 90
        assert warnings_at(cliff, 0.0, 1.0) == []
        assert len(warnings_at(cliff, 0.0, 4.0)) == 1

    def test_those_at_an_end_are_said_once(self):
        at_end, flat = warnings_at(Valley(1, 0, 0), 0.0, math.log(1e8), 2.0)
        assert "(prior precision 1e+08 in layer 1)" in at_end
        assert flat.startswith(self.SAID.format("7.39 in layer 2"))

    def test_a_flat_objective_is_said_once(self):
        (sentence,) = warnings_at(Valley(0, 0, 0), 0.0, 0.0, 0.0)
        assert "is not determined by the 90 labels: one ten times" in sentence

    def test_at_most_two_more_evaluations_for_each_layer(self):
        for valley, most in ((Valley(1, 1, 1, 1), 4), (Valley(1, 0, 0, 0), 1 + 2 * 3)):
            by_layer = []
            for asked in (False, True):
                valley.calls = 0
                warnings_at(valley, 0.0, 0.0, 0.0, 0.0, by_layer=asked)
                by_layer.append(valley.calls)
            assert by_layer[1] - by_layer[0] == most

    @pytest.mark.parametrize(("dead", "expected"), [((), [0]), ((1,), [1])])
    def test_of_a_fit(self, cache, dead, expected):
        """One layer of the fixture is flat by itself; one that no logit depends on is, too."""
        prior, binned = cache.prior.clone(), cache.binned.clone()
        prior[:, dead], binned[:, dead] = 0, 0
        part = replace(cache, prior=prior, binned=binned)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            log_precision = fit_lpo(part, num_samples=100).log()
        (sentence,) = [str(warning.message) for warning in caught]
        loss = _Objective(part, 100, 0)
        steps = torch.eye(3, dtype=torch.float64) * math.log(10)
        at = float(loss(log_precision))
        largest = [max(abs(float(loss(log_precision + sign * step)) - at) for sign in (-1, 1)) for step in steps]
        assert [layer for layer in range(3) if 90 * largest[layer] < 0.1] == expected
        assert [int(layer) for layer in re.findall(r"in layer (\d)", sentence)] == expected
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fit_lpo(part, "global", num_samples=100)
            fit_lpo(part, prior=LogNormalPrior(torch.ones(3), 1.0), num_samples=100)
