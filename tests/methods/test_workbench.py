"""Fitting without a trainer: what is looked at, how often, and what the numbers are."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import pytest
import torch
from methods_cases import RANK3
from oracles.models import answer_logits, split, toy_batch, toy_model

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
from bmoe_lightning.methods.storage import load_fit, save_fit
from bmoe_lightning.methods.training_data import Batches, PassFiles

DOWN = ("layers.0.mixture.crew.down_proj", "layers.1.mixture.crew.down_proj")
FITTED = (TemperatureScaling, LaplaceEvidence, LaplaceLPO, LaplaceTemperature, EvidenceTemperature, ShrunkTemperature)


def methods_of(*kinds, curvature=RANK3, **options):
    made = []
    for kind in kinds:
        fitting = {name: value for name, value in options.items() if name in kind.__dataclass_fields__}
        made.append(kind(**fitting).with_defaults(curvature))
    return made


EVERYTHING = methods_of(MAP, MCDropout, CheckpointEnsemble, DeepEnsemble, *FITTED, num_samples=500)


def identity(batch):
    """Survives the shallow copy in which a batch is handed over."""
    return batch["ids"].data_ptr()


class Counted:
    """`answer_logits` that remembers the batches it was asked about."""

    def __init__(self):
        self.seen = []

    def __call__(self, model, batch):
        self.seen.append(identity(batch))
        return answer_logits(model, batch)


class Untouchable:
    def __iter__(self):
        raise AssertionError("data that no method needs were looked at")


@pytest.fixture(scope="module")
def model():
    return toy_model()


@pytest.fixture(scope="module")
def prior_mean(model):
    generator = torch.Generator().manual_seed(5)
    return {
        name: p.detach() + 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
        for name in DOWN
        for p in [model.get_parameter(name)]
    }


@pytest.fixture(scope="module")
def train():
    return split(toy_batch(num_rows=60, seed=3), 20, 20, 20)


@pytest.fixture(scope="module")
def calibration(model):
    """Labels drawn from softmax(f / 2): a temperature of about 2 fits them."""
    batch = toy_batch(num_rows=112, seed=4)
    with torch.no_grad():
        probabilities = (answer_logits(model, batch)[0] / 2).softmax(-1)
    labels = torch.multinomial(probabilities, 1, generator=torch.Generator().manual_seed(6)).squeeze(1)
    return split({**batch, "labels": labels}, 40, 40, 32)


@pytest.fixture(scope="module")
def everything(model, train, calibration, prior_mean):
    return fit_methods(EVERYTHING, model, answer_logits, train, calibration, prior_mean=prior_mean)


def state(fit, name):
    return fit.methods[name].state


def precision(fit, name):
    return state(fit, name)["prior_precision"].tolist()


def nll(log_probs, labels):
    return float(-log_probs.gather(1, labels.unsqueeze(1)).sum())


def whole(model, batches):
    with torch.no_grad():
        pairs = [answer_logits(model, batch) for batch in batches]
    return torch.cat([logits for logits, _ in pairs]), torch.cat([labels for _, labels in pairs])


def distances(model, reference):
    return [
        float((model.get_parameter(name).detach() - (0 if reference is None else reference[name])).square().sum())
        for name in DOWN
    ]


def assert_stationary(posterior, precisions, squared_distances):
    for layer, value, distance in zip(posterior.factors.layers, precisions, squared_distances, strict=True):
        s = layer.curvature()
        assert float((s / (value + s)).sum()) == pytest.approx(value * distance, rel=1e-6)


class TestWhatIsLookedAt:
    def test_all_methods_share_one_pass_over_each_split(self, model, train, calibration, prior_mean):
        counted = Counted()
        # Iterators, which cannot be gone through twice.
        fit_methods(EVERYTHING, model, counted, iter(train), iter(calibration), prior_mean=prior_mean)
        assert counted.seen == [identity(batch) for batch in (*train, *calibration)]

    def test_two_curvatures_share_the_calibration_pass(self, model, train, calibration):
        counted = Counted()
        other = Curvature(rank=2, fisher="empirical")
        methods = [*methods_of(LaplaceLPO), LaplaceLPO(name="other", curvature=other)]
        fit = fit_methods(methods, model, counted, train, iter(calibration))
        assert counted.seen == [identity(batch) for batch in (*train, *train, *calibration)]
        assert set(fit.posteriors) == {RANK3.digest, other.digest}
        for method in methods:
            alone = fit_methods([method], model, answer_logits, train, calibration)
            assert precision(alone, method.name) == pytest.approx(precision(fit, method.name), rel=1e-9)

    @pytest.mark.parametrize("kinds", [(TemperatureScaling,), (MAP, TemperatureScaling)])
    def test_temperature_needs_no_curvature(self, model, calibration, kinds):
        counted = Counted()
        fit = fit_methods(methods_of(*kinds), model, counted, Untouchable(), iter(calibration))
        assert counted.seen == [identity(batch) for batch in calibration]
        assert fit.posteriors == {}

    def test_evidence_needs_no_calibration(self, model, train, prior_mean):
        methods = methods_of(MAP, LaplaceEvidence)
        one = fit_methods(methods, model, answer_logits, iter(train), Untouchable(), prior_mean=prior_mean)
        other = fit_methods(methods, model, answer_logits, train, None, prior_mean=prior_mean)
        assert precision(one, "laplace_evidence") == precision(other, "laplace_evidence")
        served = one.served_posterior(RANK3.digest)
        assert served.prior_precision.tolist() == precision(one, "laplace_evidence")

    def test_nothing_is_fitted_for_methods_that_need_nothing(self, model):
        methods = methods_of(MAP, MCDropout, CheckpointEnsemble, DeepEnsemble)
        fit = fit_methods(methods, model, answer_logits, Untouchable(), Untouchable())
        assert fit.posteriors == {}
        assert {name: entry.state for name, entry in fit.methods.items() if entry.state} == {
            "checkpoint_ensemble": {"members": 0}
        }

    @pytest.mark.parametrize("kind", FITTED)
    def test_a_method_alone_gets_what_it_gets_among_all(self, model, train, calibration, prior_mean, everything, kind):
        method = next(method for method in EVERYTHING if type(method) is kind)
        alone = fit_methods([method], model, answer_logits, train, calibration, prior_mean=prior_mean)
        assert set(alone.methods) == {method.name}
        for key, value in state(everything, method.name).items():
            torch.testing.assert_close(state(alone, method.name)[key], value, rtol=1e-3, atol=0)

    def test_model_is_as_before(self, model, train, calibration, prior_mean):
        before = [p.detach().clone() for p in model.parameters()]
        random_state = torch.get_rng_state()
        fit_methods(EVERYTHING, model, answer_logits, train, calibration, prior_mean=prior_mean)
        assert torch.equal(torch.get_rng_state(), random_state)
        for one, other in zip(before, model.parameters(), strict=True):
            assert torch.equal(one, other)
            assert other.grad is None


class TestAddingMethods:
    def test_does_only_what_they_need(self, model, train, calibration, prior_mean, everything):
        counted = Counted()
        added = [LaplaceLPO(name="lpo_global", scope="global", curvature=RANK3)]
        fit = fit_methods([*EVERYTHING, *added], model, counted, train, iter(calibration), earlier=everything)
        assert counted.seen == [identity(batch) for batch in (train[0], *calibration)]
        assert fit.fit_id == everything.fit_id
        assert set(fit.methods) == {*everything.methods, "lpo_global"}
        assert all(fit.methods[name] is entry for name, entry in everything.methods.items())
        alone = fit_methods(added, model, answer_logits, train, calibration)
        assert precision(fit, "lpo_global") == pytest.approx(precision(alone, "lpo_global"), rel=1e-9)

    def test_options_of_prediction_touch_no_fit(self, model, train, calibration, everything):
        methods = methods_of(MAP, *FITTED[:3], num_samples=7, link="probit")
        fit = fit_methods(methods, model, answer_logits, train, calibration, earlier=everything)
        assert fit.methods == everything.methods

    def test_a_method_with_other_options_is_fitted_again(self, model, train, calibration, prior_mean, everything):
        counted = Counted()
        methods = methods_of(LaplaceTemperature, num_samples=500, link="probit")
        assert everything.differences(methods[0]) == ["link='mc' (here 'probit')"]
        fit = fit_methods(methods, model, counted, train, calibration, earlier=everything, prior_mean=prior_mean)
        assert counted.seen == [identity(batch) for batch in (train[0], *calibration)]
        assert fit.differences(methods[0]) == []
        assert precision(fit, "laplace_temperature") == precision(everything, "laplace_temperature")
        assert not torch.equal(*(state(x, "laplace_temperature")["temperature"] for x in (fit, everything)))

    def test_other_weights_are_refused(self, train, calibration, everything):
        with pytest.raises(WeightMismatchError, match="other weights"):
            fit_methods(EVERYTHING, toy_model(3), answer_logits, train, calibration, earlier=everything)


class TestResumedPasses:
    def test_a_fit_that_was_killed_resumes_to_the_same_bits(self, model, train, calibration, prior_mean, tmp_path):
        curvature = Curvature(rank=3, fisher="mc")
        methods = methods_of(LaplaceEvidence, LaplaceLPO, curvature=curvature)
        expected = fit_methods(methods, model, answer_logits, train, calibration, prior_mean=prior_mean)
        options = {"prior_mean": prior_mean, "pass_files": PassFiles(tmp_path, every=1)}

        def killed():
            yield from train[:2]
            raise RuntimeError("killed")

        with pytest.raises(RuntimeError, match="killed"):
            fit_methods(methods, model, answer_logits, killed(), calibration, **options)
        counted = Counted()
        found = fit_methods(methods, model, counted, train, calibration, **options)
        assert counted.seen == [identity(batch) for batch in [calibration[0], train[2], *calibration]]
        for one, other in zip(
            expected.posteriors[curvature.digest].factors.layers,
            found.posteriors[curvature.digest].factors.layers,
            strict=True,
        ):
            assert all(torch.equal(value, other.tensors()[name]) for name, value in one.tensors().items())
        assert precision(found, "laplace_lpo") == precision(expected, "laplace_lpo")
        assert PassFiles(tmp_path, 1).path(curvature).is_file()  # whoever writes the fit removes it

    def test_by_default_nothing_is_written(self, model, train, prior_mean, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        fit_methods(methods_of(LaplaceEvidence), model, answer_logits, train, None, prior_mean=prior_mean)
        assert list(tmp_path.iterdir()) == []


class TestNumbers:
    def test_temperature_is_where_the_nll_is_least(self, model, calibration, everything):
        logits, labels = whole(model, calibration)
        found = float(state(everything, "temperature")["temperature"])
        least = nll((logits / found).log_softmax(-1), labels)
        for other in (found * 1.01, found / 1.01):
            assert nll((logits / other).log_softmax(-1), labels) > least
        assert 1.3 < found < 3

    def test_evidence_precision_is_stationary(self, model, prior_mean, everything):
        posterior = everything.posteriors[RANK3.digest]
        assert_stationary(posterior, precision(everything, "laplace_evidence"), distances(model, prior_mean))

    def test_evidence_with_a_prior_mean_of_zero_needs_no_weights_from_before(self, model, train, prior_mean):
        methods = methods_of(LaplaceEvidence, prior_mean="zero")
        fit = fit_methods(methods, model, answer_logits, train, None)
        assert_stationary(fit.posteriors[RANK3.digest], precision(fit, "laplace_evidence"), distances(model, None))
        given = fit_methods(methods, model, answer_logits, train, None, prior_mean=prior_mean)
        assert precision(given, "laplace_evidence") == precision(fit, "laplace_evidence")

    def test_a_global_scope_has_one_precision(self, model, train, calibration, prior_mean):
        methods = methods_of(LaplaceEvidence, LaplaceLPO, scope="global")
        fit = fit_methods(methods, model, answer_logits, train, calibration, prior_mean=prior_mean)
        assert all(len(set(precision(fit, method.name))) == 1 for method in methods)

    def test_shrunk_temperature_is_where_its_objective_is_least(self, model, calibration, everything):
        logits, labels = whole(model, calibration)

        def objective(temperature):
            penalty = (1 / temperature - 0.4) ** 2 / (2 * 0.2**2)
            return nll((logits / temperature).log_softmax(-1), labels) + penalty

        found = float(state(everything, "shrunk_temperature")["temperature"])
        assert objective(found) < min(objective(found * 1.01), objective(found / 1.01))

    def test_laplace_temperature_is_where_the_nll_is_least(self, model, calibration, everything):
        found = state(everything, "laplace_temperature")
        posterior = everything.posteriors[RANK3.digest].with_prior_precision(found["prior_precision"])
        log_probs = torch.cat(
            [posterior.predict(model, answer_logits, batch, num_samples=500) for batch in calibration]
        )
        labels = whole(model, calibration)[1]
        values = [
            nll((log_probs / (found["temperature"] * factor)).log_softmax(-1), labels) for factor in (1, 1.02, 1 / 1.02)
        ]
        assert values[0] == min(values)

    def test_a_part_stands_for_the_whole(self, model, train, prior_mean):
        fit = fit_methods(
            methods_of(LaplaceEvidence), model, answer_logits, Batches(train, size=600), None, prior_mean=prior_mean
        )
        posterior = fit.posteriors[RANK3.digest]
        assert (posterior.factors.num_examples, posterior.factors.num_examples_used) == (600, 60)
        assert_stationary(posterior, precision(fit, "laplace_evidence"), distances(model, prior_mean))

    def test_a_capped_pass_takes_as_many_batches(self, model, train, prior_mean):
        curvature = replace(RANK3, max_batches=2)
        fit = fit_methods(
            methods_of(LaplaceEvidence, curvature=curvature),
            model, answer_logits, Batches(train, size=60), None, prior_mean=prior_mean,
        )  # fmt: skip
        factors = fit.posteriors[curvature.digest].factors
        assert (factors.num_examples, factors.num_examples_used) == (60, 40)


class TestSkippedLayers:
    def test_stay_out_of_the_posterior_and_of_the_distances(self, model, train, calibration, prior_mean, everything):
        curvature = replace(RANK3, skip_layers=(0,))
        methods = methods_of(LaplaceEvidence, LaplaceLPO, curvature=curvature)
        fit = fit_methods(methods, model, answer_logits, train, calibration, prior_mean=prior_mean)
        assert [layer.index for layer in fit.posteriors[curvature.digest].factors.layers] == [1]
        assert precision(fit, "laplace_evidence") == pytest.approx(precision(everything, "laplace_evidence")[1:])
        assert len(precision(fit, "laplace_lpo")) == 1

    @pytest.mark.parametrize(("skipped", "message"), [((1, 7), r"\[7\].*2 such layers"), ((1, 0), "all 2")])
    def test_what_cannot_be_skipped_is_refused_before_the_data_are_looked_at(self, model, skipped, message):
        methods = methods_of(LaplaceLPO, curvature=replace(RANK3, skip_layers=skipped))
        with pytest.raises(ValueError, match=message):
            fit_methods(methods, model, answer_logits, Untouchable(), Untouchable())


class TestMissing:
    @pytest.mark.parametrize("kind", [LaplaceEvidence, EvidenceTemperature])
    def test_prior_mean_is_missed_before_the_data_are_looked_at(self, model, kind):
        with pytest.raises(ValueError, match="prior_mean='zero'"):
            fit_methods(methods_of(kind), model, answer_logits, Untouchable(), Untouchable())

    def test_a_prior_mean_that_equals_the_weights_is_refused_before_the_data_are_looked_at(self, model):
        same = {name: model.get_parameter(name).detach() for name in DOWN}
        with pytest.raises(ValueError, match="equal the prior mean"):
            fit_methods(methods_of(LaplaceEvidence), model, answer_logits, Untouchable(), None, prior_mean=same)
        broken = {name: torch.full_like(value, torch.nan) for name, value in same.items()}
        with pytest.raises(ValueError, match="not finite"):
            fit_methods(methods_of(LaplaceEvidence), model, answer_logits, Untouchable(), None, prior_mean=broken)

    @pytest.mark.parametrize("kind", [kind for kind in FITTED if kind is not LaplaceEvidence])
    def test_calibration_split(self, model, prior_mean, kind):
        methods = methods_of(MAP, kind)
        with pytest.raises(ValueError, match=f"'{methods[1].name}'.*no calibration split"):
            fit_methods(methods, model, answer_logits, Untouchable(), None, prior_mean=prior_mean)

    @pytest.mark.parametrize("kind", [TemperatureScaling, LaplaceLPO, LaplaceTemperature, ShrunkTemperature])
    def test_labels(self, model, train, calibration, prior_mean, kind):
        bare = [{name: value for name, value in batch.items() if name != "labels"} for batch in calibration]
        with pytest.raises(ValueError, match="labels"):
            fit_methods(methods_of(kind), model, answer_logits, train, bare, prior_mean=prior_mean)

    def test_the_evidence_temperature_needs_no_labels(self, model, train, calibration, prior_mean):
        bare = [{name: value for name, value in batch.items() if name != "labels"} for batch in calibration]
        with_labels, without = (
            fit_methods(
                methods_of(MAP, EvidenceTemperature), model, answer_logits, train, batches, prior_mean=prior_mean
            )
            for batches in (calibration, bare)
        )
        assert state(with_labels, "evidence_temperature") == state(without, "evidence_temperature")

    @pytest.mark.parametrize("kind", [TemperatureScaling, LaplaceLPO, EvidenceTemperature])
    def test_calibration_examples(self, model, train, prior_mean, kind):
        with pytest.raises(ValueError, match=r"empty calibration split|calibration split is empty"):
            fit_methods(methods_of(kind), model, answer_logits, train, [], prior_mean=prior_mean)

    def test_enough_inputs_for_the_evidence_temperature(self, model, train, calibration, prior_mean):
        with pytest.raises(ValueError, match="at least 100 inputs of the validation split, and there are 80"):
            fit_methods(
                methods_of(EvidenceTemperature), model, answer_logits, train, calibration[:2], prior_mean=prior_mean
            )


def test_factors_in_half_precision_and_on_the_cpu(model, everything, train, calibration, prior_mean):
    curvature = replace(RANK3, factor_dtype="bfloat16", offload=True)
    methods = methods_of(*FITTED, curvature=curvature, num_samples=500)
    fit = fit_methods(methods, model, answer_logits, train, calibration, prior_mean=prior_mean)
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


def test_held_out_logits_are_stored(model, calibration):
    methods = methods_of(TemperatureScaling)
    fit = fit_methods(methods, model, answer_logits, Untouchable(), calibration)
    logits, labels = whole(model, calibration)
    torch.testing.assert_close(fit.calibration[0], logits.double())
    assert torch.equal(fit.calibration[1], labels)
    again = [*methods, TemperatureScaling(name="again")]
    more = fit_methods(again, model, answer_logits, Untouchable(), calibration, earlier=fit)
    assert state(more, "again") == state(fit, "temperature")
    assert more.calibration is fit.calibration
    without_data = fit_methods(again, model, answer_logits, Untouchable(), None, earlier=fit)
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
    def test_are_stored_and_logged_once_with_the_methods_they_are_about(self, model, caplog):
        methods = [Doubtful(), Doubtful(name="other"), Doubtful(name="third", sentence="something else"), MAP()]
        with caplog.at_level(logging.WARNING, "bmoe_lightning"):
            fit = fit_methods(methods, model, answer_logits, Untouchable(), Untouchable())
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

    def test_methods_that_are_kept_keep_theirs_without_a_second_line(self, model, caplog):
        earlier = fit_methods([Doubtful()], model, answer_logits, Untouchable(), Untouchable())
        caplog.clear()
        completed = fit_methods([Doubtful(), MAP()], model, answer_logits, Untouchable(), None, earlier=earlier)
        assert completed.warnings_of(Doubtful()) == ("the number 7 is at a bound; add labels",)
        assert not caplog.records

    def test_of_functions_that_know_no_workbench(self, model, calibration):
        labels_it_predicts = [{**batch, "labels": answer_logits(model, batch)[0].argmax(1)} for batch in calibration]
        fit = fit_methods([TemperatureScaling()], model, answer_logits, Untouchable(), labels_it_predicts)
        (sentence,) = fit.warnings_of(TemperatureScaling())
        assert "end of the search range" in sentence


def test_a_fit_keeps_to_the_memory_of_the_terms(model, train, calibration, prior_mean, everything):
    """Compact terms; the temperatures see all labels, and no method sees terms and labels of different examples."""
    methods = methods_of(TemperatureScaling, LaplaceLPO, LaplaceTemperature, EvidenceTemperature, num_samples=500)
    options = {"prior_mean": prior_mean}
    given = [with_memory(method, 1_000_000) for method in methods[1:]]
    small = fit_methods([methods[0], *given], model, answer_logits, train, calibration, **options)
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

    def fit(self, model, train, calibration, methods, earlier=None):
        return fit_methods(methods, model, answer_logits, train, calibration, earlier=earlier)

    @pytest.mark.parametrize("memory", [LITTLE, COMPACT])
    def test_are_exact_once_there_is_more_memory(self, model, train, calibration, memory, tmp_path):
        little, much = ([with_memory(m, n) for m in self.methods] for n in (memory, self.EXACT))
        save_fit(tmp_path, self.fit(model, train, calibration, [*little, TemperatureScaling()]))
        first, _ = load_fit(tmp_path)
        assert [first.is_finished(method) for method in (*little, *much)] == [True, False]
        assert all(first.is_fitted(method) for method in much)  # it predicts what it always did
        seen = Counted()
        completed = fit_methods([*much, TemperatureScaling()], model, seen, train, calibration, earlier=first)
        # The first batches, which are compared, and the held-out data; no curvature is collected again.
        assert len(seen.seen) == len(calibration) + 1
        expected = self.fit(model, train, calibration, much)
        for method in much:
            assert same_state(completed, expected, method.name)
            assert completed.warnings_of(method) == expected.warnings_of(method)
            assert completed.is_finished(method)
        assert completed.methods["temperature"] is first.methods["temperature"]
        assert all(completed.is_finished(method) for method in little)

    def test_are_said_to_be_those_of_a_subset_for_each_method(self, model, train, calibration):
        of_all = replace(self.methods[0], name="of_all_layers", scope="global")
        methods = [with_memory(method, self.LITTLE) for method in (*self.methods, of_all)]
        fit = self.fit(model, train, calibration, methods)
        for method in methods:
            assert any("held-out examples take more than" in sentence for sentence in fit.warnings_of(method))
        assert fit.warnings_of(TemperatureScaling()) == ()

    def test_depend_on_no_other_method(self, model, train, calibration):
        """Neither on the number of curvatures nor on their memory."""
        lpo = with_memory(self.methods[0], self.EXACT)
        others = [
            replace(lpo, name="of_rank_2", curvature=replace(RANK3, rank=2)),
            replace(with_memory(lpo, self.LITTLE), name="with_little_memory"),
        ]
        alone, beside = (self.fit(model, train, calibration, table) for table in ([lpo], [*others, lpo]))
        assert same_state(alone, beside, "laplace_lpo")
        little = self.fit(model, train, calibration, others[1:])
        assert same_state(little, beside, "with_little_memory")
