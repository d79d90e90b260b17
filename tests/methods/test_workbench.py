"""Fitting without a trainer: what is looked at, how often, and what the numbers are."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from oracles.models import answer_logits, split, toy_batch, toy_model

from bmoe_lightning.methods import save_snapshot
from bmoe_lightning.methods.options import METHODS, FitSettings, FittedState
from bmoe_lightning.methods.workbench import Fitted, build_methods, fit

DOWN = ("layers.0.mixture.crew.down_proj", "layers.1.mixture.crew.down_proj")
FITTED = ("temperature", "laplace_evidence", "laplace_lpo", "laplace_temperature", "evidence_temperature")
FITTED = (*FITTED, "shrunk_temperature")


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
    settings = FitSettings(methods=METHODS, rank=3, num_samples=500)
    return settings, fit(model, answer_logits, settings, train, calibration, prior_mean=prior_mean)


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


def assert_stationary(posterior, precision, squared_distances):
    for layer, value, distance in zip(posterior.factors.layers, precision, squared_distances, strict=True):
        s = layer.curvature()
        assert float((s / (value + s)).sum()) == pytest.approx(value * distance, rel=1e-6)


class TestWhatIsLookedAt:
    def test_all_methods_share_one_pass_over_each_split(self, model, train, calibration, prior_mean):
        counted = Counted()
        # Iterators, which cannot be gone through twice.
        fit(model, counted, FitSettings(METHODS, rank=3), iter(train), iter(calibration), prior_mean=prior_mean)
        assert counted.seen == [identity(batch) for batch in (*train, *calibration)]

    @pytest.mark.parametrize("methods", [("temperature",), ("map", "temperature")])
    def test_temperature_needs_no_curvature(self, model, calibration, methods):
        counted = Counted()
        fitted = fit(model, counted, FitSettings(methods), Untouchable(), iter(calibration))
        assert counted.seen == [identity(batch) for batch in calibration]
        assert fitted.posterior is None

    def test_evidence_needs_no_calibration(self, model, train, prior_mean):
        settings = FitSettings(("map", "laplace_evidence"), rank=3)
        one = fit(model, answer_logits, settings, iter(train), Untouchable(), prior_mean=prior_mean)
        other = fit(model, answer_logits, settings, train, None, prior_mean=prior_mean)
        assert one.state == other.state
        assert one.posterior.prior_precision.tolist() == list(one.state.evidence_precision)

    def test_nothing_is_fitted_for_methods_that_need_nothing(self, model):
        settings = FitSettings(("map", "mc_dropout", "checkpoint_ensemble", "deep_ensemble"))
        fitted = fit(model, answer_logits, settings, Untouchable(), Untouchable())
        assert (fitted.state, fitted.posterior) == (FittedState(), None)

    @pytest.mark.parametrize(
        ("method", "wanted"),
        [
            ("temperature", {"temperature"}),
            ("laplace_evidence", {"evidence_precision"}),
            ("laplace_lpo", {"lpo_precision"}),
            ("laplace_temperature", {"evidence_precision", "laplace_temperature"}),
            ("evidence_temperature", {"evidence_precision", "evidence_temperature"}),
            ("shrunk_temperature", {"evidence_precision", "evidence_temperature", "shrunk_temperature"}),
        ],
    )
    def test_a_method_alone_gets_what_it_gets_among_all(
        self, model, train, calibration, prior_mean, everything, method, wanted
    ):
        settings = replace(everything[0], methods=(method,))
        alone = asdict(fit(model, answer_logits, settings, train, calibration, prior_mean=prior_mean).state)
        among_all = asdict(everything[1].state)
        assert {name for name, value in alone.items() if value is not None} == wanted
        for name in wanted:
            assert alone[name] == pytest.approx(among_all[name], rel=1e-3)

    def test_model_is_as_before(self, model, train, calibration, prior_mean):
        before = [p.detach().clone() for p in model.parameters()]
        state = torch.get_rng_state()
        fit(model, answer_logits, FitSettings(METHODS, rank=3), train, calibration, prior_mean=prior_mean)
        assert torch.equal(torch.get_rng_state(), state)
        for one, other in zip(before, model.parameters(), strict=True):
            assert torch.equal(one, other)
            assert other.grad is None


class TestCheckpoint:
    def test_a_fit_that_was_cut_off_goes_on_to_the_same_bits(self, model, train, calibration, prior_mean, tmp_path):
        settings = FitSettings(("laplace_evidence", "laplace_lpo"), rank=3, fisher="mc", num_samples=500)
        expected = fit(model, answer_logits, settings, train, calibration, prior_mean=prior_mean)
        path = tmp_path / "sums.safetensors"
        checkpoint = {"curvature_checkpoint": path, "curvature_checkpoint_every": 1}

        def cut_off():
            yield from train[:2]
            raise RuntimeError("killed")

        with pytest.raises(RuntimeError, match="killed"):
            fit(model, answer_logits, settings, cut_off(), calibration, prior_mean=prior_mean, **checkpoint)
        counted = Counted()
        found = fit(model, counted, settings, train, calibration, prior_mean=prior_mean, **checkpoint)
        assert counted.seen == [identity(batch) for batch in [train[2], *calibration]]
        expected.posterior.save(tmp_path / "expected")
        found.posterior.save(tmp_path / "found")
        assert (tmp_path / "found").read_bytes() == (tmp_path / "expected").read_bytes()
        assert found.state == expected.state
        assert path.is_file()  # whoever writes the posterior removes it

    def test_by_default_nothing_is_written(self, model, train, prior_mean, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        fit(model, answer_logits, FitSettings(("laplace_evidence",)), train, None, prior_mean=prior_mean)
        assert list(tmp_path.iterdir()) == []


class TestNumbers:
    def test_temperature_is_where_the_nll_is_least(self, model, calibration, everything):
        logits, labels = whole(model, calibration)
        found = everything[1].state.temperature
        least = nll((logits / found).log_softmax(-1), labels)
        for other in (found * 1.01, found / 1.01):
            assert nll((logits / other).log_softmax(-1), labels) > least
        assert 1.3 < found < 3

    def test_evidence_precision_is_stationary(self, model, prior_mean, everything):
        fitted = everything[1]
        assert_stationary(fitted.posterior, fitted.state.evidence_precision, distances(model, prior_mean))

    def test_evidence_with_a_prior_mean_of_zero_needs_no_weights_from_before(self, model, train):
        settings = FitSettings(("laplace_evidence",), rank=3, prior_mean="zero")
        fitted = fit(model, answer_logits, settings, train, None)
        assert_stationary(fitted.posterior, fitted.state.evidence_precision, distances(model, None))
        assert fitted.posterior.prior_mean == "zero"

    def test_prior_mean_is_not_looked_at_where_it_is_zero(self, model, train, prior_mean):
        settings = FitSettings(("laplace_evidence",), rank=3, prior_mean="zero")
        one = fit(model, answer_logits, settings, train, None, prior_mean=prior_mean)
        assert one.state == fit(model, answer_logits, settings, train, None).state

    def test_a_global_scope_has_one_precision(self, model, train, calibration, prior_mean):
        settings = FitSettings(("laplace_evidence", "laplace_lpo"), rank=3, evidence_scope="global", lpo_scope="global")
        state = fit(model, answer_logits, settings, train, calibration, prior_mean=prior_mean).state
        assert len(set(state.evidence_precision)) == len(set(state.lpo_precision)) == 1

    def test_lpo_is_the_posterior_s_own_and_becomes_its_precision(self, model, calibration, everything):
        fitted = everything[1]
        expected = fitted.posterior.fit_prior_lpo(model, answer_logits, calibration).prior_precision
        assert list(fitted.state.lpo_precision) == pytest.approx(expected.tolist(), rel=1e-6)
        assert fitted.posterior.prior_precision.tolist() == list(fitted.state.lpo_precision)

    @pytest.mark.parametrize("methods", [("evidence_temperature",), METHODS])
    def test_evidence_temperature_is_the_posterior_s_own(self, model, train, calibration, prior_mean, methods):
        fitted = fit(model, answer_logits, FitSettings(methods, rank=3), train, calibration, prior_mean=prior_mean)
        posterior = fitted.posterior.with_prior_precision(torch.tensor(fitted.state.evidence_precision))
        expected = posterior.evidence_temperature(model, answer_logits, calibration)
        assert fitted.state.evidence_temperature == pytest.approx(expected, rel=1e-3)
        assert expected > 1.01

    def test_shrunk_temperature_is_where_its_objective_is_least(self, model, calibration, everything):
        logits, labels = whole(model, calibration)
        state = everything[1].state

        def objective(temperature):
            penalty = (math.log(temperature) - math.log(state.evidence_temperature)) ** 2 / (2 * 0.2**2)
            return nll((logits / temperature).log_softmax(-1), labels) + penalty

        found = state.shrunk_temperature
        assert objective(found) < min(objective(found * 1.01), objective(found / 1.01))

    def test_laplace_temperature_is_where_the_nll_is_least(self, model, calibration, everything):
        state, settings = everything[1].state, everything[0]
        posterior = everything[1].posterior.with_prior_precision(torch.tensor(state.evidence_precision))
        log_probs = torch.cat(
            [posterior.predict(model, answer_logits, batch, num_samples=settings.num_samples) for batch in calibration]
        )
        labels = whole(model, calibration)[1]
        values = [
            nll((log_probs / (state.laplace_temperature * factor)).log_softmax(-1), labels)
            for factor in (1, 1.02, 1 / 1.02)
        ]
        assert values[0] == min(values)

    def test_a_part_stands_for_the_whole(self, model, train, prior_mean):
        settings = FitSettings(("laplace_evidence",), rank=3)
        fitted = fit(model, answer_logits, settings, train, None, prior_mean=prior_mean, num_examples=600)
        factors = fitted.posterior.factors
        assert (factors.num_examples, factors.num_examples_used) == (600, 60)
        assert_stationary(fitted.posterior, fitted.state.evidence_precision, distances(model, prior_mean))


class TestSkippedLayers:
    def test_stay_out_of_the_posterior_and_of_the_distances(self, model, train, calibration, prior_mean, everything):
        settings = replace(everything[0], skip_layers=(0,))
        fitted = fit(model, answer_logits, settings, train, calibration, prior_mean=prior_mean)
        assert [layer.index for layer in fitted.posterior.factors.layers] == [1]
        assert fitted.state.evidence_precision == pytest.approx(everything[1].state.evidence_precision[1:])
        assert len(fitted.state.lpo_precision) == 1
        methods = build_methods(model, replace(settings, methods=("laplace_lpo",)), fitted)
        assert methods[0].posterior.prior_precision.tolist() == list(fitted.state.lpo_precision)

    @pytest.mark.parametrize(("skipped", "message"), [((1, 7), r"\[7\].*2 expert layers"), ((1, 0), "all 2")])
    def test_what_cannot_be_skipped_is_refused_before_the_data_are_looked_at(self, model, skipped, message):
        settings = FitSettings(("laplace_lpo",), skip_layers=skipped)
        with pytest.raises(ValueError, match=message):
            fit(model, answer_logits, settings, Untouchable(), Untouchable())


class TestMissing:
    @pytest.mark.parametrize("method", ["laplace_evidence", "evidence_temperature", "shrunk_temperature"])
    def test_prior_mean_is_missed_before_the_data_are_looked_at(self, model, method):
        with pytest.raises(ValueError, match="prior_mean='zero'"):
            fit(model, answer_logits, FitSettings((method,)), Untouchable(), Untouchable())

    @pytest.mark.parametrize("method", [name for name in FITTED if name != "laplace_evidence"])
    def test_calibration_split(self, model, prior_mean, method):
        with pytest.raises(ValueError, match=f"'{method}'.*no calibration split"):
            fit(model, answer_logits, FitSettings(("map", method)), Untouchable(), None, prior_mean=prior_mean)

    @pytest.mark.parametrize("method", ["temperature", "laplace_lpo", "laplace_temperature", "shrunk_temperature"])
    def test_labels(self, model, train, calibration, prior_mean, method):
        bare = [{name: value for name, value in batch.items() if name != "labels"} for batch in calibration]
        with pytest.raises(ValueError, match="labels"):
            fit(model, answer_logits, FitSettings((method,), rank=3), train, bare, prior_mean=prior_mean)

    def test_the_evidence_temperature_needs_no_labels(self, model, train, calibration, prior_mean):
        bare = [{name: value for name, value in batch.items() if name != "labels"} for batch in calibration]
        settings = FitSettings(("map", "evidence_temperature"), rank=3)
        with_labels, without = (
            fit(model, answer_logits, settings, train, batches, prior_mean=prior_mean).state
            for batches in (calibration, bare)
        )
        assert without == with_labels

    @pytest.mark.parametrize("method", ["temperature", "laplace_lpo", "evidence_temperature"])
    def test_calibration_examples(self, model, train, prior_mean, method):
        with pytest.raises(ValueError, match=r"empty calibration|calibration split is empty|got none"):
            fit(model, answer_logits, FitSettings((method,), rank=3), train, [], prior_mean=prior_mean)

    @pytest.mark.parametrize("method", ["evidence_temperature", "shrunk_temperature"])
    def test_enough_inputs_for_the_evidence_temperature(self, model, train, calibration, prior_mean, method):
        with pytest.raises(ValueError, match="at least 100 unlabelled inputs, got 80"):
            fit(model, answer_logits, FitSettings((method,), rank=3), train, calibration[:2], prior_mean=prior_mean)


class TestFittedState:
    FULL = FittedState(1.5, 2.0, 1.7, 0.9, (0.5, 3.0), (4.0, 4.0))

    @pytest.mark.parametrize("state", [FittedState(), FULL, FittedState(evidence_precision=(1e-3,))])
    def test_comes_back_through_json(self, state):
        assert FittedState.from_mapping(json.loads(json.dumps(asdict(state)))) == state

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"temprature": 1.0}, "temprature"),
            ({"temperature": "1.0"}, "temperature must hold positive numbers, got '1.0'"),
            ({"temperature": 0.0}, "positive"),
            ({"temperature": -1.0}, "positive"),
            ({"temperature": math.nan}, "positive"),
            ({"temperature": math.inf}, "positive"),
            ({"temperature": True}, "positive"),
            ({"temperature": [1.0]}, "positive"),
            ({"lpo_precision": 1.0}, "lpo_precision must hold positive numbers"),
            ({"lpo_precision": "12"}, "positive"),
            ({"lpo_precision": [1.0, -1.0]}, "positive"),
            ({"lpo_precision": [1.0, None]}, "positive"),
            ({"lpo_precision": []}, "positive"),
        ],
    )
    def test_refuses_what_it_never_wrote(self, values, message):
        with pytest.raises(ValueError, match=message):
            FittedState.from_mapping(values)

    def test_scalars_name_layers_only_where_they_differ(self):
        assert self.FULL.scalars() == {
            "posterior/temperature": 1.5,
            "posterior/evidence_temperature": 2.0,
            "posterior/shrunk_temperature": 1.7,
            "posterior/laplace_temperature": 0.9,
            "posterior/evidence_precision/layer_0": 0.5,
            "posterior/evidence_precision/layer_1": 3.0,
            "posterior/lpo_precision": 4.0,
        }
        assert FittedState().scalars() == {}

    def test_scalars_of_the_curvature(self, train):
        model = toy_model(idle=[1])
        settings = FitSettings(("laplace_evidence",), rank=2, prior_mean="zero")
        fitted = fit(model, answer_logits, settings, train, None)
        found = fitted.scalars()
        slots = torch.cat([layer.slots for layer in fitted.posterior.factors.layers])
        assert found["curvature/slots_per_expert_min"] == 0
        assert found["curvature/slots_per_expert_mean"] == pytest.approx(float(slots.sum()) / 8)
        assert found["curvature/idle_experts"] == 2  # expert 1 of each layer
        assert 0 < found["curvature/discarded_energy"] < 1
        assert found.items() > fitted.state.scalars().items()

    def test_full_rank_discards_nothing(self, model, train):
        settings = FitSettings(("laplace_evidence",), rank=6, prior_mean="zero")
        found = fit(model, answer_logits, settings, train, None).scalars()
        assert found["curvature/discarded_energy"] == pytest.approx(0, abs=1e-9)

    def test_scalars_without_a_posterior(self):
        assert Fitted(FittedState(temperature=2.0)).scalars() == {"posterior/temperature": 2.0}


class TestBuildMethods:
    LABELS = {  # noqa: RUF012
        "map": "MAP",
        "mc_dropout": "MC dropout",
        "checkpoint_ensemble": "Checkpoint ensemble",
        "deep_ensemble": "Deep ensemble",
        "temperature": "Temperature scaling",
        "laplace_evidence": "Bayesian-MoE (evidence)",
        "laplace_lpo": "Bayesian-MoE (LPO)",
        "laplace_temperature": "Bayesian-MoE + temperature",
        "evidence_temperature": "Evidence temperature",
        "shrunk_temperature": "Shrunk temperature",
    }

    @pytest.mark.parametrize("order", [METHODS, METHODS[::-1], METHODS[3:6]])
    def test_names_and_labels_in_the_order_asked_for(self, model, everything, tmp_path, order):
        files = [tmp_path / name for name in ("one", "two")]
        for file in files:
            save_snapshot(file, {DOWN[0]: model.get_parameter(DOWN[0])})
        settings = replace(everything[0], methods=order)
        methods = build_methods(model, settings, everything[1], snapshots=files, ensemble_members=files[:1])
        assert [method.name for method in methods] == list(order)
        assert [method.label for method in methods] == [self.LABELS[name] for name in order]

    def test_each_has_its_own_numbers(self, model, everything):
        state = everything[1].state
        settings = replace(everything[0], methods=("mc_dropout", *FITTED), link="probit", dropout=0.3, seed=4)
        found = {m.name: m for m in build_methods(model, settings, everything[1])}
        for name in ("temperature", "laplace_temperature", "evidence_temperature", "shrunk_temperature"):
            assert found[name].hyperparameters()["temperature"] == getattr(state, name)
        for name, precision in (
            ("laplace_evidence", state.evidence_precision),
            ("laplace_temperature", state.evidence_precision),
            ("laplace_lpo", state.lpo_precision),
        ):
            assert found[name].posterior.prior_precision.tolist() == list(precision)
            assert (found[name].link, found[name].num_samples, found[name].seed) == ("probit", 500, 4)
        assert (found["mc_dropout"].p, found["mc_dropout"].num_samples, found["mc_dropout"].seed) == (0.3, 10, 4)

    @pytest.mark.parametrize("method", FITTED)
    def test_what_was_not_fitted_is_refused(self, model, everything, method):
        settings = FitSettings((method,))
        with pytest.raises(ValueError, match=f"{method} has not been fitted"):
            build_methods(model, settings, Fitted())
        others = {name: None for name in asdict(FittedState()) if name.startswith(method.removeprefix("laplace_"))}
        if method == "laplace_temperature":
            others = {"laplace_temperature": None}
        fitted = replace(everything[1], state=replace(everything[1].state, **others))
        with pytest.raises(ValueError, match=f"{method} has not been fitted"):
            build_methods(model, settings, fitted)

    @pytest.mark.parametrize("method", ["laplace_evidence", "laplace_lpo", "laplace_temperature"])
    def test_numbers_without_the_posterior_are_not_enough(self, model, everything, method):
        with pytest.raises(ValueError, match="has not been fitted"):
            build_methods(model, FitSettings((method,)), Fitted(everything[1].state))

    @pytest.mark.parametrize("method", ["checkpoint_ensemble", "deep_ensemble"])
    def test_an_ensemble_needs_members(self, model, method):
        with pytest.raises(ValueError, match=f"{method} needs snapshots"):
            build_methods(model, FitSettings((method,)), Fitted())


class TestFitSettings:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"evidence_scope": "expert"}, "evidence_scope 'expert'; valid are global, layer"),
            ({"lpo_scope": "model"}, "lpo_scope"),
            ({"prior_mean": "ones"}, "prior_mean"),
            ({"approximation": "full"}, "approximation"),
            ({"num_samples": 0}, "num_samples"),
            ({"dropout_samples": 0}, "dropout_samples"),
            ({"methods": ("shrunk_temperature",), "fisher": "empirical"}, "exact"),
        ],
    )
    def test_refuses(self, options, message):
        with pytest.raises(ValueError, match=message):
            FitSettings(**options)

    def test_any_fisher_serves_a_posterior(self):
        assert FitSettings(("laplace_evidence",), fisher="mc").needs_evidence


def test_factors_in_half_precision_and_on_the_cpu(model, everything, train, calibration, prior_mean):
    settings = replace(everything[0], factor_dtype="bfloat16", offload_factors=True)
    fitted = fit(model, answer_logits, settings, train, calibration, prior_mean=prior_mean)
    assert fitted.posterior.offload
    assert {layer.g_basis.dtype for layer in fitted.posterior.factors.layers} == {torch.bfloat16}
    expected = everything[1].state
    for name, value in expected.scalars().items():
        assert fitted.state.scalars()[name] == pytest.approx(value, rel=0.02), name
    assert fitted.state.evidence_precision == expected.evidence_precision  # from eigenvalues alone
    assert settings.fitting_differences(fitted.settings) == []
    assert everything[0].fitting_differences(fitted.settings) == ["factor_dtype='bfloat16' (here 'float32')"]
    assert replace(settings, offload_factors=False).fitting_differences(fitted.settings) == []
    assert settings.fitting_differences({"rank": settings.rank}) == []  # of a release that knew one dtype
    with pytest.raises(ValueError, match=r"unknown factor_dtype 'float16'; valid are float32, bfloat16"):
        FitSettings(factor_dtype="float16")
