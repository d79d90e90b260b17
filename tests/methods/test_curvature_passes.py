"""Passes over the training data: what part of them stands for, which curvatures share one, and what is stored of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from methods_cases import RANK3
from oracles.models import answer_logits
from workbench_cases import FITTED, Untouchable, assert_stationary, distances, methods_of, precision, state

from bmoe_lightning.methods import LaplaceEvidence, LaplaceLPO, fit_methods
from bmoe_lightning.methods.training_data import Batches


class TestPartOfTheData:
    def test_a_part_stands_for_the_whole(self, tuned, train, prior_mean):
        fit = fit_methods(
            methods_of(LaplaceEvidence), tuned, answer_logits, Batches(train, size=600), None, prior_mean=prior_mean
        )
        posterior = fit.posteriors[RANK3.digest]
        assert (posterior.factors.num_examples, posterior.factors.num_examples_used) == (600, 60)
        assert_stationary(posterior, precision(fit, "laplace_evidence"), distances(tuned, prior_mean))

    def test_a_capped_pass_takes_as_many_batches(self, tuned, train, prior_mean):
        curvature = replace(RANK3, max_batches=2)
        fit = fit_methods(
            methods_of(LaplaceEvidence, curvature=curvature),
            tuned, answer_logits, Batches(train, size=60), None, prior_mean=prior_mean,
        )  # fmt: skip
        factors = fit.posteriors[curvature.digest].factors
        assert (factors.num_examples, factors.num_examples_used) == (60, 40)


class Counting:
    """Batches, and how often they were iterated over."""

    def __init__(self, batches):
        self.batches, self.count = batches, 0

    def __iter__(self):
        self.count += 1
        return iter(self.batches)


class TestSkippedLayers:
    def test_stay_out_of_the_posterior_and_of_the_distances(self, tuned, train, calibration, prior_mean, everything):
        curvature = replace(RANK3, skip_layers=(0,))
        methods = methods_of(LaplaceEvidence, LaplaceLPO, curvature=curvature)
        fit = fit_methods(methods, tuned, answer_logits, train, calibration, prior_mean=prior_mean)
        assert [layer.index for layer in fit.posteriors[curvature.digest].factors.layers] == [1]
        assert precision(fit, "laplace_evidence") == pytest.approx(precision(everything, "laplace_evidence")[1:])
        assert len(precision(fit, "laplace_lpo")) == 1

    def test_share_one_pass_with_every_other_choice_of_layers(self, tuned, train, calibration, prior_mean):
        curvatures = [replace(RANK3, skip_layers=skipped) for skipped in ((0,), (1,), ())]
        methods = [LaplaceLPO(name=f"skip_{i}", curvature=c) for i, c in enumerate(curvatures)]
        passes = Counting(train)
        fit = fit_methods(methods, tuned, answer_logits, passes, calibration)
        assert passes.count == 1
        for method in methods:
            alone = fit_methods([method], tuned, answer_logits, train, calibration)
            assert precision(fit, method.name) == precision(alone, method.name)
            (digest,) = fit.methods[method.name].curvatures
            layers = zip(fit.posteriors[digest].factors.layers, alone.posteriors[digest].factors.layers, strict=True)
            assert all(one.equals(other) for one, other in layers)

    def test_are_added_to_a_fit_of_all_layers_without_a_pass(self, tuned, train, calibration):
        whole = fit_methods([LaplaceLPO(curvature=RANK3)], tuned, answer_logits, train, calibration)
        passes = Counting(train)
        part = LaplaceLPO(name="part", curvature=replace(RANK3, skip_layers=(0,)))
        fit = fit_methods([part], tuned, answer_logits, passes, calibration, earlier=whole)
        assert fit.is_fitted(part)
        assert passes.count == 1  # the data are compared with those of the fit
        layer = fit.posteriors[part.curvature.digest].factors.layers[0]
        assert layer is whole.posteriors[RANK3.digest].factors.layers[1]

    @pytest.mark.parametrize(("skipped", "message"), [((1, 7), r"\[7\].*1 is layers.1"), ((1, 0), "all 2")])
    def test_what_cannot_be_skipped_is_refused_before_the_data_are_looked_at(self, tuned, skipped, message):
        methods = methods_of(LaplaceLPO, curvature=replace(RANK3, skip_layers=skipped))
        with pytest.raises(ValueError, match=message):
            fit_methods(methods, tuned, answer_logits, Untouchable(), Untouchable())


def test_factors_in_half_precision_and_on_the_cpu(tuned, everything, train, calibration, prior_mean):
    curvature = replace(RANK3, factor_dtype="bfloat16", offload=True)
    methods = methods_of(*FITTED, curvature=curvature, num_samples=500)
    fit = fit_methods(methods, tuned, answer_logits, train, calibration, prior_mean=prior_mean)
    posterior = fit.posteriors[curvature.digest]
    assert posterior.offload
    assert {layer.g_basis.dtype for layer in posterior.factors.layers} == {torch.bfloat16}
    for method in methods:
        for key, value in state(everything, method.name).items():
            torch.testing.assert_close(state(fit, method.name)[key], value, rtol=0.02, atol=0)
    # From eigenvalues alone.
    assert precision(fit, "laplace_evidence") == precision(everything, "laplace_evidence")
    assert replace(curvature, offload=False).digest == curvature.digest
    assert curvature.digest != RANK3.digest
