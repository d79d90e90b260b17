"""Every member of the mixture predicts with its weights, its curvature and its prior precision, each from its fit."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from methods_cases import RANK3, fitted
from oracles.models import answer_logits, split, toy_batch, toy_model
from workbench_cases import DOWN, moved_weights

from bmoe_lightning.curvature import Curvature
from bmoe_lightning.laplace.posterior import WeightMismatchError
from bmoe_lightning.methods import (
    DeepEnsemble,
    LaplaceEvidence,
    LaplaceLPO,
    LaplaceMixture,
    NotFittedError,
    evaluate,
    fit_methods,
    save_snapshot,
)
from bmoe_lightning.methods.evaluation import Predictor
from bmoe_lightning.methods.options import trial_options
from bmoe_lightning.methods.storage import load_fit, save_fit

EVIDENCE = LaplaceEvidence(curvature=RANK3, num_samples=200)
FEW = LaplaceMixture(component="laplace_evidence", curvature=RANK3, num_samples=200)
TRAINING = split(toy_batch(num_rows=24, seed=3), 12, 12)
SEEDS = (3, 4)
RANK4 = Curvature(rank=4)


def run_of(seed):
    """The model of another run, built without any of the code under test: the same one with other second weights."""
    model = toy_model()
    with torch.no_grad():
        for name in DOWN:
            model.get_parameter(name).copy_(toy_model(seed).get_parameter(name))
    return model


def fit_to(model, *methods):
    return fit_methods(
        methods, model, answer_logits, TRAINING, [toy_batch(20, seed=2)], prior_mean=moved_weights(toy_model())
    )


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """The weights of two further runs, and the folders of the fits to them."""
    folder = tmp_path_factory.mktemp("runs")
    runs, fits = [], []
    for seed in SEEDS:
        model = run_of(seed)
        runs.append(str(folder / f"{seed}.safetensors"))
        fits.append(str(folder / f"fit-{seed}"))
        save_snapshot(runs[-1], {name: model.get_parameter(name) for name in DOWN})
        save_fit(folder / f"fit-{seed}", fit_to(model, EVIDENCE))
    return {"runs": tuple(runs), "fits": tuple(fits)}


@pytest.fixture(scope="module")
def own():
    """The fit of the mixture, and of one posterior, to this run."""
    return fit_to(toy_model(), FEW, EVIDENCE)


def log_probs(method, fit, model, batches):
    return evaluate([method], fit, model, answer_logits, batches)[method.name].log_probs


@pytest.mark.parametrize("link", ["mc", "probit"])
def test_it_averages_what_each_run_predicts_with_its_own_fit(model, batches, own, others, link):
    posterior, mixture = replace(EVIDENCE, link=link), replace(FEW, link=link, **others)
    found = log_probs(mixture, own, model, batches)
    models = [toy_model(), *map(run_of, SEEDS)]
    parts = [log_probs(posterior, fit_to(run, posterior), run, batches).exp() for run in models]
    torch.testing.assert_close(found.exp(), torch.stack(parts).mean(0), rtol=1e-10, atol=1e-14)
    assert (parts[0] - parts[1]).abs().max() > 1e-3
    precisions = [fit_to(run, EVIDENCE).state_of(EVIDENCE)["prior_precision"] for run in models]
    assert not any(torch.allclose(precisions[0], other) for other in precisions[1:])


def test_it_may_be_fitted_to_held_out_data(model, batches, others, tmp_path):
    posterior = LaplaceLPO(curvature=RANK3, num_samples=200)
    mixture = LaplaceMixture(curvature=RANK3, num_samples=200)
    run = run_of(SEEDS[0])
    of_run = fit_to(run, posterior)
    save_fit(tmp_path / "fit", of_run)
    own = fit_to(model, mixture, posterior)
    given = replace(mixture, runs=others["runs"][:1], fits=(str(tmp_path / "fit"),))
    parts = [log_probs(posterior, *case, batches).exp() for case in ((own, model), (of_run, run))]
    found = log_probs(given, own, model, batches)
    torch.testing.assert_close(found.exp(), torch.stack(parts).mean(0), rtol=1e-10, atol=1e-14)
    assert mixture.needs.calibration_labels
    assert not FEW.needs.calibration


def certain(fit, method):
    """A fit whose variances are below rounding."""
    state = {key: torch.full_like(value, 1e300) for key, value in fit.methods[method.name].state.items()}
    return replace(fit, methods={method.name: replace(fit.methods[method.name], state=state)})


def test_without_variance_it_is_the_deep_ensemble_bit_for_bit(model, batches, own, others, tmp_path):
    fits = []
    for folder in others["fits"]:
        fits.append(str(tmp_path / f"{len(fits)}"))
        save_fit(tmp_path / f"{len(fits) - 1}", certain(load_fit(Path(folder))[0], EVIDENCE))
    ensemble = DeepEnsemble(runs=others["runs"])
    expected = log_probs(ensemble, fitted((ensemble, {})), model, batches)
    for link in ("probit", "mc"):
        mixture = replace(FEW, link=link, runs=others["runs"], fits=tuple(fits))
        found = log_probs(mixture, certain(own, FEW), model, batches)
        if link == "probit":
            assert torch.equal(found, expected)
        else:  # the average over equal samples rounds
            torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


def test_of_equal_members_it_is_the_posterior_of_one(model, batches, own, tmp_path):
    runs, fits = [], []
    for index in range(2):
        runs.append(str(tmp_path / f"{index}.safetensors"))
        fits.append(str(tmp_path / f"fit-{index}"))
        save_snapshot(runs[-1], {name: model.get_parameter(name) for name in DOWN})
        save_fit(tmp_path / f"fit-{index}", own)
    found = log_probs(replace(FEW, runs=runs, fits=fits), own, model, batches)
    expected = log_probs(EVIDENCE, own, model, batches)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)
    assert torch.equal(found == -torch.inf, torch.cat([batch["absent"] for batch in batches]))


def doubtful(fit, method, *sentences):
    """A fit that has warnings."""
    return replace(fit, methods={method.name: replace(fit.methods[method.name], warnings=sentences)}, warnings=())


def test_the_warnings_of_all_fits_are_the_predictions_each_sentence_once(model, batches, own, others, tmp_path):
    fits = [str(tmp_path / f"{number}") for number in range(2)]
    for folder, source, said in zip(fits, others["fits"], ("one member", "common"), strict=True):
        save_fit(Path(folder), doubtful(load_fit(Path(source))[0], EVIDENCE, "common", said))
    mixture, ensemble = replace(FEW, runs=others["runs"], fits=tuple(fits)), DeepEnsemble(runs=others["runs"])
    marked = replace(doubtful(own, FEW, "this run"), warnings=("whatever the method",))
    found = evaluate([mixture, ensemble], marked, model, answer_logits, batches)
    assert found[mixture.name].warnings == ("this run", "whatever the method", "common", "one member")
    assert found[ensemble.name].warnings == ("whatever the method",)


def test_a_single_batch_is_predicted_as_in_a_whole_data_set(model, batches, own, others):
    method = replace(FEW, **others)
    expected = log_probs(method, own, model, batches)[: len(batches[0]["labels"])]
    predictor = Predictor(method, own)
    found, view = predictor.predict(model, answer_logits, batches[0])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)
    assert torch.equal(view.logits, answer_logits(toy_model(), batches[0])[0])  # of the current weights
    assert predictor.covariance(view) is None  # members have no common one


class TestRefusals:
    """All before the first batch: the data have none to give."""

    class Untouchable:
        def __iter__(self):
            raise AssertionError("the pass over the data has begun")

    def refused(self, own, model, error, match, **given):
        method = replace(FEW, **given)
        for refusing in (
            lambda: evaluate([method], own, model, answer_logits, self.Untouchable()),
            lambda: method.check_run(model, None),
        ):
            with pytest.raises(error, match=match):
                refusing()

    def test_a_run_without_a_fit(self, model, own, others, tmp_path):
        self.refused(
            own,
            model,
            FileNotFoundError,
            "needs a fit of laplace_evidence to the weights in .*3.safetensors.* has no fit; train that run with",
            runs=others["runs"][:1],
            fits=(str(tmp_path / "nowhere"),),
        )

    def test_the_fit_of_another_run(self, model, own, others):
        self.refused(
            own,
            model,
            WeightMismatchError,
            "fit-4 is to other weights than .*3.safetensors gives the model .*in the order of runs=",
            runs=others["runs"],
            fits=others["fits"][::-1],
        )

    def test_a_fit_with_other_options(self, model, own, others):
        other = replace(FEW, scope="global")
        with pytest.raises(NotFittedError, match=r"no fit of laplace_evid.*scope='layer' \(here 'global'\).*fit it"):
            replace(other, **others).check_run(model, None)
        fit = fit_to(model, replace(FEW, curvature=RANK4))
        self.refused(fit, model, NotFittedError, "rank=3", curvature=RANK4, **others)

    def test_weights_that_are_gone(self, model, own, others, tmp_path):
        runs = (others["runs"][0], str(tmp_path / "gone.safetensors"))
        self.refused(own, model, FileNotFoundError, "gone.safetensors", runs=runs, fits=others["fits"])

    def test_no_runs_at_all(self, model, batches, own):
        with pytest.raises(ValueError, match="laplace_mixture needs snapshots of the trained weights"):
            log_probs(FEW, own, model, batches)


@pytest.mark.parametrize("failing_call", [1, 4, 7])
def test_the_model_is_as_before_after_an_exception(model, batches, own, others, failing_call):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    held = dict(model.named_parameters())
    calls = []

    def failing(model, batch):
        calls.append(0)
        if len(calls) == failing_call:
            raise KeyboardInterrupt
        return answer_logits(model, batch)

    with pytest.raises(KeyboardInterrupt):
        evaluate([replace(FEW, **others)], own, model, failing, batches)
    log_probs(replace(FEW, **others), own, model, batches)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter is held[name] for name, parameter in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


class TestOptions:
    def test_each_run_has_a_fit(self, others):
        with pytest.raises(ValueError, match="of laplace_lpo to each of its runs, got 2 runs and 0 fits; pass fits="):
            LaplaceMixture(runs=others["runs"])

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"size": 1}, "at least 2 posteriors, got size=1"),
            ({"component": "map"}, "unknown component 'map'; valid are laplace_lpo, laplace_evidence"),
            ({"scope": "expert"}, "unknown scope"),
            ({"link": "logit"}, "unknown link"),
        ],
    )
    def test_values_are_checked(self, options, match):
        with pytest.raises(ValueError, match=match):
            LaplaceMixture(**options)

    def test_further_runs_are_needed_with_a_fit_to_each_unless_they_are_given(self, others):
        needs = LaplaceMixture(size=4).needs
        assert needs.runs == 3
        assert "3 further fine-tuning runs with a fit of laplace_lpo to each" in needs.describe()
        assert "runs" not in replace(FEW, **others).needs.describe()
        (posterior,) = replace(FEW, name="other").needs.run_methods
        assert (posterior.name, posterior.fit_options()) == ("other", EVIDENCE.fit_options())
        assert trial_options(LaplaceMixture) == {"size": 2}

    def test_files_are_no_matter_of_the_fit(self, own, others):
        assert own.is_fitted(replace(FEW, **others))
        assert own.is_fitted(replace(FEW, size=4, link="probit"))
        assert own.differences(replace(FEW, scope="global")) == ["scope='layer' (here 'global')"]

    def test_what_is_logged(self, own, others):
        numbers = replace(FEW, **others).hyperparameters(own.state_of(FEW))
        assert numbers["members"] == 3
        assert math.isfinite(numbers["prior_precision_0"])
