"""Fitting without a trainer: what is looked at and how often, what is missed, and what is warned of."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import pytest
import torch
from methods_cases import RANK3
from oracles.models import answer_logits, toy_model
from workbench_cases import (
    DOWN,
    EVERYTHING,
    FITTED,
    Counted,
    Untouchable,
    identity,
    methods_of,
    precision,
    state,
    twice,
    whole,
)

from bmoe_lightning.curvature import Curvature
from bmoe_lightning.laplace import WeightMismatchError
from bmoe_lightning.methods import (
    MAP,
    CheckpointEnsemble,
    DeepEnsemble,
    EvidenceTemperature,
    LaplaceEvidence,
    LaplaceLPO,
    LaplaceTemperature,
    MCDropout,
    ShrunkTemperature,
    TemperatureScaling,
    fit_methods,
)
from bmoe_lightning.methods.base import Method, scalar
from bmoe_lightning.methods.training_data import PassFiles


class TestWhatIsLookedAt:
    def test_all_methods_share_one_pass_over_each_split(self, tuned, train, calibration, prior_mean):
        counted = Counted()
        # Iterators, which cannot be gone through twice.
        fit_methods(EVERYTHING, tuned, counted, iter(train), iter(calibration), prior_mean=prior_mean)
        assert counted.seen == [identity(batch) for batch in (*twice(train), *calibration)]

    def test_two_curvatures_share_the_calibration_pass(self, tuned, train, calibration):
        counted = Counted()
        other = Curvature(rank=2, fisher="empirical")
        methods = [*methods_of(LaplaceLPO), LaplaceLPO(name="other", curvature=other)]
        fit = fit_methods(methods, tuned, counted, train, iter(calibration))
        assert counted.seen == [identity(batch) for batch in (*twice(train), *twice(train), *calibration)]
        assert set(fit.posteriors) == {RANK3.digest, other.digest}
        for method in methods:
            alone = fit_methods([method], tuned, answer_logits, train, calibration)
            assert precision(alone, method.name) == pytest.approx(precision(fit, method.name), rel=1e-9)

    @pytest.mark.parametrize("kinds", [(TemperatureScaling,), (MAP, TemperatureScaling)])
    def test_temperature_needs_no_curvature(self, tuned, calibration, kinds):
        counted = Counted()
        fit = fit_methods(methods_of(*kinds), tuned, counted, Untouchable(), iter(calibration))
        assert counted.seen == [identity(batch) for batch in calibration]
        assert fit.posteriors == {}

    def test_evidence_needs_no_calibration(self, tuned, train, prior_mean):
        methods = methods_of(MAP, LaplaceEvidence)
        one = fit_methods(methods, tuned, answer_logits, iter(train), Untouchable(), prior_mean=prior_mean)
        other = fit_methods(methods, tuned, answer_logits, train, None, prior_mean=prior_mean)
        assert precision(one, "laplace_evidence") == precision(other, "laplace_evidence")
        served = one.served_posterior(RANK3.digest)
        assert served.prior_precision.tolist() == precision(one, "laplace_evidence")

    def test_nothing_is_fitted_for_methods_that_need_nothing(self, tuned):
        methods = methods_of(MAP, MCDropout, CheckpointEnsemble, DeepEnsemble)
        fit = fit_methods(methods, tuned, answer_logits, Untouchable(), Untouchable())
        assert fit.posteriors == {}
        assert {name: entry.state for name, entry in fit.methods.items() if entry.state} == {
            "checkpoint_ensemble": {"members": 0}
        }

    @pytest.mark.parametrize("kind", FITTED)
    def test_a_method_alone_gets_what_it_gets_among_all(self, tuned, train, calibration, prior_mean, everything, kind):
        method = next(method for method in EVERYTHING if type(method) is kind)
        alone = fit_methods([method], tuned, answer_logits, train, calibration, prior_mean=prior_mean)
        assert set(alone.methods) == {method.name}
        for key, value in state(everything, method.name).items():
            torch.testing.assert_close(state(alone, method.name)[key], value, rtol=1e-3, atol=0)

    def test_model_is_as_before(self, tuned, train, calibration, prior_mean):
        before = [p.detach().clone() for p in tuned.parameters()]
        random_state = torch.get_rng_state()
        fit_methods(EVERYTHING, tuned, answer_logits, train, calibration, prior_mean=prior_mean)
        assert torch.equal(torch.get_rng_state(), random_state)
        for one, other in zip(before, tuned.parameters(), strict=True):
            assert torch.equal(one, other)
            assert other.grad is None


class TestAddingMethods:
    def test_does_only_what_they_need(self, tuned, train, calibration, prior_mean, everything):
        counted = Counted()
        added = [LaplaceLPO(name="lpo_global", scope="global", curvature=RANK3)]
        fit = fit_methods([*EVERYTHING, *added], tuned, counted, train, iter(calibration), earlier=everything)
        assert counted.seen == [identity(batch) for batch in (train[0], *calibration)]
        assert fit.fit_id == everything.fit_id
        assert set(fit.methods) == {*everything.methods, "lpo_global"}
        assert all(fit.methods[name] is entry for name, entry in everything.methods.items())
        alone = fit_methods(added, tuned, answer_logits, train, calibration)
        assert precision(fit, "lpo_global") == pytest.approx(precision(alone, "lpo_global"), rel=1e-9)

    def test_options_of_prediction_touch_no_fit(self, tuned, train, calibration, everything):
        methods = methods_of(MAP, *FITTED[:3], num_samples=7, link="probit")
        fit = fit_methods(methods, tuned, answer_logits, train, calibration, earlier=everything)
        assert fit.methods == everything.methods

    def test_a_method_with_other_options_is_fitted_again(self, tuned, train, calibration, prior_mean, everything):
        counted = Counted()
        methods = methods_of(LaplaceTemperature, num_samples=500, link="probit")
        assert everything.differences(methods[0]) == ["link='mc' (here 'probit')"]
        fit = fit_methods(methods, tuned, counted, train, calibration, earlier=everything, prior_mean=prior_mean)
        assert counted.seen == [identity(batch) for batch in (train[0], *calibration)]
        assert fit.differences(methods[0]) == []
        assert precision(fit, "laplace_temperature") == precision(everything, "laplace_temperature")
        assert not torch.equal(*(state(x, "laplace_temperature")["temperature"] for x in (fit, everything)))

    def test_other_weights_are_refused(self, train, calibration, everything):
        with pytest.raises(WeightMismatchError, match="other weights"):
            fit_methods(EVERYTHING, toy_model(3), answer_logits, train, calibration, earlier=everything)


class TestResumedPasses:
    def test_a_fit_that_was_killed_resumes_to_the_same_bits(self, tuned, train, calibration, prior_mean, tmp_path):
        curvature = Curvature(rank=3, fisher="mc")
        methods = methods_of(LaplaceEvidence, LaplaceLPO, curvature=curvature)
        expected = fit_methods(methods, tuned, answer_logits, train, calibration, prior_mean=prior_mean)
        options = {"prior_mean": prior_mean, "pass_files": PassFiles(tmp_path, every=1)}

        def killed():
            yield from train[:2]
            raise RuntimeError("killed")

        with pytest.raises(RuntimeError, match="killed"):
            fit_methods(methods, tuned, answer_logits, killed(), calibration, **options)
        counted = Counted()
        found = fit_methods(methods, tuned, counted, train, calibration, **options)
        assert counted.seen == [identity(batch) for batch in [calibration[0], *twice(train[2:3]), *calibration]]
        for one, other in zip(
            expected.posteriors[curvature.digest].factors.layers,
            found.posteriors[curvature.digest].factors.layers,
            strict=True,
        ):
            assert all(torch.equal(value, other.tensors()[name]) for name, value in one.tensors().items())
        assert precision(found, "laplace_lpo") == precision(expected, "laplace_lpo")
        assert PassFiles(tmp_path, 1).path(curvature).is_file()  # whoever writes the fit removes it

    def test_by_default_nothing_is_written(self, tuned, train, prior_mean, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        fit_methods(methods_of(LaplaceEvidence), tuned, answer_logits, train, None, prior_mean=prior_mean)
        assert list(tmp_path.iterdir()) == []


class TestMissing:
    @pytest.mark.parametrize("kind", [LaplaceEvidence, EvidenceTemperature])
    def test_prior_mean_is_missed_before_the_data_are_looked_at(self, tuned, kind):
        with pytest.raises(ValueError, match="prior_mean='zero'"):
            fit_methods(methods_of(kind), tuned, answer_logits, Untouchable(), Untouchable())

    def test_a_prior_mean_that_equals_the_weights_is_refused_before_the_data_are_looked_at(self, tuned):
        same = {name: tuned.get_parameter(name).detach() for name in DOWN}
        with pytest.raises(ValueError, match="equal the prior mean"):
            fit_methods(methods_of(LaplaceEvidence), tuned, answer_logits, Untouchable(), None, prior_mean=same)
        broken = {name: torch.full_like(value, torch.nan) for name, value in same.items()}
        with pytest.raises(ValueError, match="not finite"):
            fit_methods(methods_of(LaplaceEvidence), tuned, answer_logits, Untouchable(), None, prior_mean=broken)

    @pytest.mark.parametrize("kind", [kind for kind in FITTED if kind is not LaplaceEvidence])
    def test_calibration_split(self, tuned, prior_mean, kind):
        methods = methods_of(MAP, kind)
        with pytest.raises(ValueError, match=f"'{methods[1].name}'.*no calibration split"):
            fit_methods(methods, tuned, answer_logits, Untouchable(), None, prior_mean=prior_mean)

    @pytest.mark.parametrize("kind", [TemperatureScaling, LaplaceLPO, LaplaceTemperature, ShrunkTemperature])
    def test_labels(self, tuned, train, calibration, prior_mean, kind):
        bare = [{name: value for name, value in batch.items() if name != "labels"} for batch in calibration]
        with pytest.raises(ValueError, match="labels"):
            fit_methods(methods_of(kind), tuned, answer_logits, train, bare, prior_mean=prior_mean)

    def test_the_evidence_temperature_needs_no_labels(self, tuned, train, calibration, prior_mean):
        bare = [{name: value for name, value in batch.items() if name != "labels"} for batch in calibration]
        with_labels, without = (
            fit_methods(
                methods_of(MAP, EvidenceTemperature), tuned, answer_logits, train, batches, prior_mean=prior_mean
            )
            for batches in (calibration, bare)
        )
        assert state(with_labels, "evidence_temperature") == state(without, "evidence_temperature")

    @pytest.mark.parametrize("kind", [TemperatureScaling, LaplaceLPO, EvidenceTemperature])
    def test_calibration_examples(self, tuned, train, prior_mean, kind):
        with pytest.raises(ValueError, match=r"empty calibration split|calibration split is empty"):
            fit_methods(methods_of(kind), tuned, answer_logits, train, [], prior_mean=prior_mean)

    def test_enough_inputs_for_the_evidence_temperature(self, tuned, train, calibration, prior_mean):
        with pytest.raises(ValueError, match="at least 100 inputs of the validation split, and there are 80"):
            fit_methods(
                methods_of(EvidenceTemperature), tuned, answer_logits, train, calibration[:2], prior_mean=prior_mean
            )


def test_held_out_logits_are_stored(tuned, calibration):
    methods = methods_of(TemperatureScaling)
    fit = fit_methods(methods, tuned, answer_logits, Untouchable(), calibration)
    logits, labels = whole(tuned, calibration)
    torch.testing.assert_close(fit.calibration[0], logits.double())
    assert torch.equal(fit.calibration[1], labels)
    again = [*methods, TemperatureScaling(name="again")]
    more = fit_methods(again, tuned, answer_logits, Untouchable(), calibration, earlier=fit)
    assert state(more, "again") == state(fit, "temperature")
    assert more.calibration is fit.calibration
    without_data = fit_methods(again, tuned, answer_logits, Untouchable(), None, earlier=fit)
    assert state(without_data, "again") == state(fit, "temperature")


@dataclass(frozen=True)
class Doubtful(Method):
    """A user's method that is not sure of its number."""

    name: str = "doubtful"
    label: str = "Doubtful"
    sentence: str = "the number 7 is at a bound; add labels"

    def fit(self, work):
        work.warn(self.sentence)
        work.warn(self.sentence)
        return {"number": scalar(7)}

    def log_probs(self, batch, state):
        return batch.logits.log_softmax(-1)


class TestWarnings:
    def test_are_stored_and_logged_once_with_the_methods_they_are_about(self, tuned, caplog):
        methods = [Doubtful(), Doubtful(name="other"), Doubtful(name="third", sentence="something else"), MAP()]
        with caplog.at_level(logging.WARNING, "bmoe_lightning"):
            fit = fit_methods(methods, tuned, answer_logits, Untouchable(), Untouchable())
        assert [fit.warnings_of(method) for method in methods] == [
            ("the number 7 is at a bound; add labels",),
            ("the number 7 is at a bound; add labels",),
            ("something else",),
            (),
        ]
        assert [record.getMessage() for record in caplog.records] == [
            "doubtful, other: the number 7 is at a bound; add labels",
            "third: something else",
        ]

    def test_methods_that_are_kept_keep_theirs_without_a_second_line(self, tuned, caplog):
        earlier = fit_methods([Doubtful()], tuned, answer_logits, Untouchable(), Untouchable())
        caplog.clear()
        completed = fit_methods([Doubtful(), MAP()], tuned, answer_logits, Untouchable(), None, earlier=earlier)
        assert completed.warnings_of(Doubtful()) == ("the number 7 is at a bound; add labels",)
        assert not caplog.records

    def test_of_functions_that_know_no_workbench(self, tuned, calibration):
        labels_it_predicts = [{**batch, "labels": answer_logits(tuned, batch)[0].argmax(1)} for batch in calibration]
        fit = fit_methods([TemperatureScaling()], tuned, answer_logits, Untouchable(), labels_it_predicts)
        (sentence,) = fit.warnings_of(TemperatureScaling())
        assert "end of the search range" in sentence
