"""One run over several loaders: names, metrics, results, and ensembles on each loader's own data."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from oracles.models import answer_logits, split, toy_batch, toy_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from bmoe_lightning.curvature.spec import Curvature
from bmoe_lightning.methods import (
    CheckpointEnsemble,
    DeepEnsemble,
    LaplaceEvidence,
    LaplaceLPO,
    NotFittedError,
    TemperatureScaling,
    evaluate,
    fit_methods,
    get_method,
    save_snapshot,
)
from bmoe_lightning.trainer.evaluation import EvaluationRun, _gathered

DOWN = "layers.0.mixture.crew.down_proj"
METHODS = ("deep_ensemble", "map", "temperature", "laplace_evidence", "checkpoint_ensemble")


@pytest.fixture(scope="module")
def model():
    return toy_model()


@pytest.fixture(scope="module")
def loaders():
    """Two data sets of different sizes."""
    return [split(toy_batch(7, seed=11), 4, 3), split(toy_batch(12, seed=12), 6, 6)]


@pytest.fixture(scope="module")
def prepared(model, tmp_path_factory):
    """Methods, what was fitted, and the snapshots of the run."""
    folder = tmp_path_factory.mktemp("snapshots")
    files = [folder / f"{name}.safetensors" for name in ("one", "two", "other")]
    for scale, file in zip((0.5, 2.0, -1.0), files, strict=True):
        save_snapshot(file, {DOWN: scale * model.get_parameter(DOWN).detach()})
    methods = (
        DeepEnsemble(runs=(str(files[2]),)),
        get_method("map"),
        TemperatureScaling(),
        LaplaceEvidence(curvature=Curvature(rank=2), prior_mean="zero", num_samples=200),
        CheckpointEnsemble(),
    )
    training, calibration = [toy_batch(20, seed=1)], [toy_batch(20, seed=2)]
    fitted = fit_methods(methods, model, answer_logits, training, calibration, snapshots=files[:2], seed=7)
    return methods, fitted, files[:2]


def finished(model, prepared, loaders, stage="test"):
    run = EvaluationRun(stage, *prepared)
    for index, batches in enumerate(loaders):
        for batch in batches:
            run.add(model, answer_logits, batch, index)
    return run, run.finish(model, answer_logits, loaders)


@pytest.fixture(scope="module")
def two(model, prepared, loaders):
    return finished(model, prepared, loaders)


class TestPredictions:
    @pytest.mark.parametrize("stage", ["val", "test"])
    def test_one_loader_goes_by_the_stage_s_name(self, model, prepared, loaders, stage):
        run, found = finished(model, prepared, loaders[:1], stage)
        assert list(found) == [stage]
        assert list(found[stage]) == list(METHODS)
        assert {name.split("/")[1] for name in run.metrics()} == {stage}

    def test_several_loaders_are_numbered(self, two):
        assert list(two[1]) == ["test_0", "test_1"]
        assert [len(two[1][name]["map"].labels) for name in two[1]] == [7, 12]

    def test_every_method_sees_each_loader_s_own_data(self, model, prepared, loaders, two):
        methods, fitted, snapshots = prepared
        for name, batches in zip(("test_0", "test_1"), loaders, strict=True):
            expected = evaluate(methods, fitted, model, answer_logits, batches, snapshots)
            for method in METHODS:
                torch.testing.assert_close(two[1][name][method].log_probs, expected[method].log_probs)
                assert torch.equal(two[1][name][method].labels, torch.cat([batch["labels"] for batch in batches]))
            for key, scores in expected["laplace_evidence"].uncertainty.items():
                assert torch.equal(two[1][name]["laplace_evidence"].uncertainty[key], scores)

    def test_all_of_a_method_s_predictions_are_gathered_from_all_ranks(self, two):
        class Reversed:
            def gather(self, values):
                return values.flip(0)

        found = replace(two[1]["test_0"]["laplace_evidence"], warnings=("of a member",))
        gathered = _gathered(found, Reversed())
        for name in ("log_probs", "labels", "logits"):
            assert torch.equal(getattr(gathered, name), getattr(found, name).flip(0))
        assert gathered.warnings == found.warnings
        assert list(gathered.uncertainty) == ["mutual_information", "logit_variance", "relative_variance"]
        for key, scores in found.uncertainty.items():
            assert torch.equal(gathered.uncertainty[key], scores.flip(0))

    @pytest.mark.parametrize(
        ("method", "scales"), [("checkpoint_ensemble", (0.5, 2.0)), ("deep_ensemble", (1.0, -1.0))]
    )
    def test_ensembles_average_their_own_members(self, model, prepared, loaders, two, method, scales):
        own = model.get_parameter(DOWN).detach().clone()
        members = []
        with torch.no_grad():
            for scale in scales:
                model.get_parameter(DOWN).copy_(scale * own)
                members.append(torch.cat([answer_logits(model, batch)[0].softmax(-1) for batch in loaders[1]]))
            model.get_parameter(DOWN).copy_(own)
        torch.testing.assert_close(two[1]["test_1"][method].log_probs.exp(), torch.stack(members).mean(0))

    def test_weights_are_as_before(self, model, prepared, loaders):
        before = [p.detach().clone() for p in model.parameters()]
        finished(model, prepared, loaders)
        assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))

    def test_loaders_whose_batches_alternate(self, model, prepared, loaders, two):
        run = EvaluationRun("test", *prepared)
        for batches in zip(*loaders, strict=True):
            for index, batch in enumerate(batches):
                run.add(model, answer_logits, batch, index)
        found = run.finish(model, answer_logits, loaders)
        for name in found:
            for method in METHODS:
                assert torch.equal(found[name][method].log_probs, two[1][name][method].log_probs)

    def test_a_method_that_was_not_fitted_is_refused_before_the_first_batch(self, prepared):
        with pytest.raises(NotFittedError, match="laplace_lpo has not been fitted"):
            EvaluationRun("test", [LaplaceLPO(curvature=Curvature(rank=2))], *prepared[1:])


class TestMetrics:
    def test_keys_are_method_loader_metric(self, two):
        expected = {f"{m}/test_{i}/{k}" for m in METHODS for i in (0, 1) for k in ("acc", "ece", "nll", "brier")}
        assert set(two[0].metrics()) == expected
        assert all(isinstance(value, float) and math.isfinite(value) for value in two[0].metrics().values())

    def test_values_are_those_of_the_predictions(self, two):
        run, predictions = two
        metrics = run.metrics()
        for name in predictions:
            for method, found in predictions[name].items():
                chosen = found.log_probs.gather(1, found.labels.unsqueeze(1))
                right = found.log_probs.argmax(1) == found.labels
                one_hot = torch.nn.functional.one_hot(found.labels, found.log_probs.shape[1])
                brier = (found.log_probs.exp() - one_hot).square().sum(1).mean()
                assert metrics[f"{method}/{name}/nll"] == pytest.approx(-float(chosen.mean()))
                assert metrics[f"{method}/{name}/acc"] == pytest.approx(float(right.double().mean()))
                assert metrics[f"{method}/{name}/brier"] == pytest.approx(float(brier))

    def test_without_a_batch_there_is_nothing(self, model, prepared):
        run = EvaluationRun("test", *prepared)
        assert run.finish(model, answer_logits, []) == {}
        assert run.metrics() == {}


class TestResults:
    @pytest.mark.parametrize("loader", [0, 1])
    def test_one_a_method_in_order_with_what_was_fitted(self, prepared, two, loader):
        methods, fitted, _ = prepared
        states = {method.name: fitted.state_of(method) for method in methods}
        found = two[0].results(loader)
        assert [result.method for result in found] == list(METHODS)
        by_name = {result.method: result for result in found}
        assert by_name["laplace_evidence"].label == "Bayesian-MoE (evidence)"
        assert by_name["temperature"].extra == {"temperature": float(states["temperature"]["temperature"])}
        assert by_name["laplace_evidence"].extra == {
            f"prior_precision_{i}": float(value)
            for i, value in enumerate(states["laplace_evidence"]["prior_precision"])
        }
        assert by_name["map"].extra == {}
        assert by_name["checkpoint_ensemble"].extra == by_name["deep_ensemble"].extra == {"members": 2}
        predictions = two[1][f"test_{loader}"]
        for result in found:
            assert result.seed == 7
            assert torch.equal(result.log_probs, predictions[result.method].log_probs)
            assert torch.equal(result.target, predictions[result.method].labels)
            assert len(set(result.ids)) == len(result.target)


class TestAnEmptyLoader:
    def test_the_others_keep_their_number(self, model, prepared, loaders, tmp_path):
        run = EvaluationRun("test", *prepared)
        for batch in loaders[1]:
            run.add(model, answer_logits, batch, 1)
        found = run.finish(model, answer_logits, [[], loaders[1]])
        assert list(found) == ["test_1"]
        assert torch.equal(run.results(1)[0].log_probs, found["test_1"][METHODS[0]].log_probs)
        run.report([tmp_path], 3, verbose=False)
        assert [path.name for path in tmp_path.iterdir()] == ["test_1"]


class TestTensorBoard:
    def events(self, folder):
        events = EventAccumulator(str(folder))
        events.Reload()
        return events

    def test_one_loader_is_the_comparison(self, model, prepared, loaders, tmp_path):
        run, _ = finished(model, prepared, loaders[:1])
        run.report([tmp_path], 42, verbose=False)
        assert {path.name for path in (tmp_path / "methods").iterdir()} >= set(METHODS)
        (event,) = self.events(tmp_path / "methods" / "map").Scalars("test/nll")
        assert event.step == 42
        assert event.value == pytest.approx(run.metrics()["map/test/nll"], rel=1e-6)

    def test_the_table_of_hyperparameters_has_the_options_of_each_method(self, model, prepared, loaders, tmp_path):
        run, _ = finished(model, prepared, loaders[:1])
        run.report([tmp_path], 0, verbose=False)
        shown = {}
        for name in METHODS:
            content = self.events(tmp_path / "methods" / name).SummaryMetadata("_hparams_/session_start_info")
            settings = HParamsPluginData.FromString(content.plugin_data.content).session_start_info.hparams
            shown[name] = {key: value.number_value or value.string_value for key, value in settings.items()}
        expected = {"num_samples": 200, "prior_mean": "zero", "rank": 2, "fisher": "exact"}
        assert expected.items() <= shown["laplace_evidence"].items()
        assert shown["checkpoint_ensemble"]["num_snapshots"] == 5
        assert "rank" not in shown["map"]

    def test_several_loaders_have_a_folder_each(self, two, tmp_path):
        two[0].report([tmp_path], 1, verbose=False)
        assert {path.name for path in tmp_path.iterdir()} == {"test_0", "test_1"}
        for name in ("test_0", "test_1"):
            (event,) = self.events(tmp_path / name / "temperature").Scalars("test/acc")
            assert event.value == pytest.approx(two[0].metrics()[f"temperature/{name}/acc"], rel=1e-6)


def test_results_carry_the_warnings_of_the_fit(model, loaders, prepared):
    methods, fitted, snapshots = prepared
    doubtful = replace(fitted.methods["temperature"], warnings=("at a bound; add labels",))
    marked = replace(fitted, methods={**fitted.methods, "temperature": doubtful}, warnings=())
    run = EvaluationRun("test", methods, marked, snapshots)
    run.add(model, answer_logits, loaders[0][0], 0)
    run.finish(model, answer_logits, [loaders[0][:1]])
    assert {r.method: r.warnings for r in run.results() if r.warnings} == {"temperature": doubtful.warnings}

    def test_a_second_test_has_sub_runs_of_its_own(self, model, prepared, loaders, tmp_path):
        for step in (1, 2):
            run, _ = finished(model, prepared, loaders[:1])
            run.report([tmp_path], step, verbose=False)
        for folder, step in (("methods", 1), ("methods-2", 2)):
            (event,) = self.events(tmp_path / folder / "map").Scalars("test/nll")
            assert event.step == step

    def test_the_table_is_printed_for_each_loader(self, model, prepared, loaders, tmp_path, capsys):
        run, _ = finished(model, prepared, loaders)
        run.report([], 0, verbose=True)
        printed = capsys.readouterr().out
        assert printed.index("test_0") < printed.index("MAP") < printed.index("test_1") < printed.rindex("MAP")
        run.report([], 0, verbose=False)
        assert capsys.readouterr().out == ""
