"""The memory of the covariance terms of the held-out data: what does not fit, and how a later fit tells."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from methods_cases import RANK3
from oracles.models import answer_logits
from workbench_cases import (
    Counted,
    methods_of,
    precision,
    state,
)

from bmoe_lightning.methods import (
    EvidenceTemperature,
    LaplaceLPO,
    LaplaceTemperature,
    TemperatureScaling,
    fit_methods,
)
from bmoe_lightning.methods.storage import load_fit, save_fit


def test_a_fit_keeps_to_the_memory_of_the_terms(tuned, train, calibration, prior_mean, everything):
    """Compact terms; the temperatures see all labels, and no method sees terms and labels of different examples."""
    methods = methods_of(TemperatureScaling, LaplaceLPO, LaplaceTemperature, EvidenceTemperature, num_samples=500)
    options = {"prior_mean": prior_mean}
    given = [with_memory(method, 1_000_000) for method in methods[1:]]
    small = fit_methods([methods[0], *given], tuned, answer_logits, train, calibration, **options)
    assert all(small.is_fitted(method) for method in methods)  # they can predict with it
    assert len(small.calibration[0]) == 112
    assert torch.equal(state(small, "temperature")["temperature"], state(everything, "temperature")["temperature"])
    for name in ("laplace_temperature", "evidence_temperature"):
        found, expected = state(small, name)["temperature"], state(everything, name)["temperature"]
        assert float(found) == pytest.approx(float(expected), rel=0.02)
    # That of the other layer is so large that its size does not matter.
    assert precision(small, "laplace_lpo")[0] == pytest.approx(precision(everything, "laplace_lpo")[0], rel=0.2)
    assert min(precision(small, "laplace_lpo")[1], precision(everything, "laplace_lpo")[1]) > 1e4


def same_state(one, other, name):
    return all(torch.equal(value, state(other, name)[key]) for key, value in state(one, name).items())


def with_memory(method, cache_bytes):
    return replace(method, curvature=replace(method.curvature or RANK3, cache_bytes=cache_bytes))


class TestTermsThatDoNotFit:
    """Of 112 examples and 3 contrasts in 2 layers of 128 bins: exact terms take 2.1 MB."""

    LITTLE, COMPACT, EXACT = 100_000, 1_500_000, 3_000_000
    methods = methods_of(LaplaceLPO, num_samples=100)

    def fit(self, tuned, train, calibration, methods, earlier=None):
        return fit_methods(methods, tuned, answer_logits, train, calibration, earlier=earlier)

    @pytest.mark.parametrize("memory", [LITTLE, COMPACT])
    def test_are_exact_once_there_is_more_memory(self, tuned, train, calibration, memory, tmp_path):
        little, much = ([with_memory(m, n) for m in self.methods] for n in (memory, self.EXACT))
        save_fit(tmp_path, self.fit(tuned, train, calibration, [*little, TemperatureScaling()]))
        first, _ = load_fit(tmp_path)
        assert [first.is_finished(method) for method in (*little, *much)] == [True, False]
        assert all(first.is_fitted(method) for method in much)  # it predicts what it always did
        seen = Counted()
        completed = fit_methods([*much, TemperatureScaling()], tuned, seen, train, calibration, earlier=first)
        # The first batches, which are compared, and the held-out data; no curvature is collected again.
        assert len(seen.seen) == len(calibration) + 1
        expected = self.fit(tuned, train, calibration, much)
        for method in much:
            assert same_state(completed, expected, method.name)
            assert completed.warnings_of(method) == expected.warnings_of(method)
            assert completed.is_finished(method)
        assert completed.methods["temperature"] is first.methods["temperature"]
        assert all(completed.is_finished(method) for method in little)

    def test_are_said_to_be_those_of_a_subset_for_each_method(self, tuned, train, calibration):
        of_all = replace(self.methods[0], name="of_all_layers", scope="global")
        methods = [with_memory(method, self.LITTLE) for method in (*self.methods, of_all)]
        fit = self.fit(tuned, train, calibration, methods)
        for method in methods:
            assert any("held-out examples take more than" in sentence for sentence in fit.warnings_of(method))
        assert fit.warnings_of(TemperatureScaling()) == ()

    def test_depend_on_no_other_method(self, tuned, train, calibration):
        """Neither on the number of curvatures nor on their memory."""
        lpo = with_memory(self.methods[0], self.EXACT)
        others = [
            replace(lpo, name="of_rank_2", curvature=replace(RANK3, rank=2)),
            replace(with_memory(lpo, self.LITTLE), name="with_little_memory"),
        ]
        alone, beside = (self.fit(tuned, train, calibration, table) for table in ([lpo], [*others, lpo]))
        assert same_state(alone, beside, "laplace_lpo")
        little = self.fit(tuned, train, calibration, others[1:])
        assert same_state(little, beside, "with_little_memory")
