"""The callback through the trainer, as a user runs it, and every trap that Lightning holds for it."""

from __future__ import annotations

import json
import types
import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader, IterableDataset
from toy import ToyData, ToyModule, loader, trainer

from bmoe_lightning.callback import BayesianMoECallback
from bmoe_lightning.checks import check_later_callbacks, check_strategy
from bmoe_lightning.curvature import collect_factors
from bmoe_lightning.experts import find_expert_layers
from bmoe_lightning.laplace import LaplacePosterior, WeightMismatchError
from bmoe_lightning.passes import reproducible_order

LAPLACE = ("map", "laplace_evidence", "laplace_lpo")


def train_loader(**options):
    return loader(160, 1, shuffle=True, **options)


def calibration_loader():
    return loader(112, 2)


def test_loader():
    return loader(48, 3)


test_loader.__test__ = False  # a loader, not a test


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One run that several tests only look at."""
    folder = tmp_path_factory.mktemp("trained")
    callback = BayesianMoECallback(
        methods=(*LAPLACE, "temperature", "evidence_temperature", "shrunk_temperature", "laplace_temperature"),
        dirpath=str(folder / "bayesian"),
    )
    module = ToyModule()
    run = trainer(folder, [callback])
    run.fit(module, train_loader(), calibration_loader())
    metrics = run.test(module, test_loader(), verbose=False)[0]
    return types.SimpleNamespace(folder=folder, callback=callback, module=module, run=run, metrics=metrics)


def plain_metrics(module):
    """Accuracy and NLL of the module itself on the test data, computed here."""
    data = ToyData(48, 3)
    with torch.no_grad():
        logits, labels = module.eval().class_logits({"input_ids": data.ids, "labels": data.labels})
    module.train()
    return (logits.argmax(1) == labels).double().mean(), torch.nn.functional.cross_entropy(logits.double(), labels)


class TestAfterTraining:
    def test_logs_four_metrics_for_each_method(self, trained):
        for method in trained.callback.settings.methods:
            for metric in ("acc", "ece", "nll", "brier"):
                assert f"{method}/test/{metric}" in trained.metrics

    def test_map_is_the_module_itself(self, trained):
        accuracy, nll = plain_metrics(trained.module)
        assert trained.metrics["map/test/acc"] == pytest.approx(float(accuracy))
        assert trained.metrics["map/test/nll"] == pytest.approx(float(nll), rel=1e-5)

    def test_laplace_predictions_are_the_posterior_s(self, trained):
        batch = next(iter(test_loader()))
        state = trained.callback.fitted.state
        posterior = trained.callback.fitted.posterior.with_prior_precision(torch.tensor(state.evidence_precision))
        expected = posterior.predict(trained.module, lambda m, b: m.class_logits(b), batch)
        found = trained.callback.predictions["test"]["laplace_evidence"].log_probs[: len(expected)]
        torch.testing.assert_close(found, expected)
        assert not torch.allclose(found, trained.callback.predictions["test"]["map"].log_probs[: len(expected)])

    def test_writes_a_posterior_that_predicts_without_lightning(self, trained):
        posterior = LaplacePosterior.load(trained.folder / "bayesian" / "posterior.safetensors")
        batch = next(iter(test_loader()))
        # The bare network, without the LightningModule around it.
        network = trained.module.network

        def class_logits(model, data):
            return model(input_ids=data["input_ids"], use_cache=False).logits[:, -1, [1, 2, 3]], data["labels"]

        found = posterior.predict(network, class_logits, batch)
        expected = trained.callback.predictions["test"]["laplace_lpo"].log_probs[: len(found)]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    def test_validation_after_training_predicts_too(self, trained):
        metrics = trained.run.validate(trained.module, test_loader(), verbose=False)[0]
        assert metrics["laplace_lpo/val/nll"] == pytest.approx(trained.metrics["laplace_lpo/test/nll"])

    def test_predict_returns_probabilities_with_uncertainty(self, trained):
        outputs = trained.run.predict(trained.module, test_loader())
        first = outputs[0]
        torch.testing.assert_close(first["probs"].sum(1), torch.ones(16, dtype=torch.float64))
        torch.testing.assert_close(
            first["log_probs"], trained.callback.predictions["test"]["laplace_lpo"].log_probs[:16]
        )
        assert first["logit_covariance"].shape == (16, 3, 3)
        entropy = -(first["probs"] * first["log_probs"]).sum(1)
        torch.testing.assert_close(first["entropy"], entropy)
        assert bool((first["mutual_information"] <= first["entropy"]).all())
        assert "predict_step" not in vars(trained.module)

    def test_leaves_module_and_trainer_as_they_were(self, trained):
        assert trained.run.test_loop.inference_mode
        assert trained.run.validate_loop.inference_mode
        assert all(module.training for module in trained.module.modules())
        assert all(parameter.requires_grad for parameter in trained.module.parameters())
        assert trained.module.network.get_experts_implementation() == {"": "grouped_mm"}
        layers = find_expert_layers(trained.module)
        assert not any("_bmoe_state" in vars(trained.module.get_submodule(layer.name)) for layer in layers)


class TestTraining:
    def test_training_is_what_it_is_without_the_callback(self, tmp_path):
        weights, streams = [], []
        for callbacks in ([], [BayesianMoECallback(methods=("map", "laplace_evidence"))]):
            L.seed_everything(3)
            module = ToyModule()
            trainer(tmp_path, callbacks, max_epochs=2).fit(module, train_loader(), calibration_loader())
            weights.append([p.detach().clone() for p in module.parameters()])
            streams.append(torch.rand(4))
        for one, other in zip(*weights, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
        torch.testing.assert_close(*streams, rtol=0, atol=0)

    def test_limits_bound_the_curvature_epoch(self, tmp_path):
        callback = BayesianMoECallback()
        run = trainer(tmp_path, [callback], limit_train_batches=3, limit_val_batches=2, max_epochs=1)
        run.fit(ToyModule(), train_loader(), calibration_loader())
        factors = callback.fitted.posterior.factors
        assert (factors.num_examples_used, factors.num_examples) == (48, 48)

    def test_capped_curvature_stands_for_the_whole(self, tmp_path):
        callback = BayesianMoECallback(curvature_batches=2)
        trainer(tmp_path, [callback], max_epochs=1).fit(ToyModule(), train_loader(), calibration_loader())
        factors = callback.fitted.posterior.factors
        assert (factors.num_examples_used, factors.num_examples) == (32, 160)

    def test_sanity_check_and_validation_within_training_predict_nothing(self, tmp_path):
        callback = BayesianMoECallback()
        run = trainer(tmp_path, [callback], max_epochs=1, num_sanity_val_steps=2)
        run.fit(ToyModule(), train_loader(), calibration_loader())
        assert callback.predictions == {}
        assert not any("laplace" in key for key in run.logged_metrics)

    def test_fast_dev_run_takes_the_whole_path_and_writes_nothing(self, tmp_path):
        callback = BayesianMoECallback(methods=("map", "laplace_evidence", "laplace_lpo"))
        module = ToyModule()
        run = trainer(tmp_path, [callback], fast_dev_run=True)
        run.fit(module, train_loader(), calibration_loader())
        metrics = run.test(module, test_loader(), verbose=False)[0]
        assert "laplace_lpo/test/nll" in metrics
        assert list(tmp_path.rglob("*")) == []

    def test_scalars_of_the_fit_reach_any_logger(self, tmp_path):
        logger = CSVLogger(tmp_path)
        callback = BayesianMoECallback(lpo_scope="global")
        trainer(tmp_path, [callback], logger=logger, max_epochs=1).fit(
            ToyModule(), train_loader(), calibration_loader()
        )
        text = (Path(logger.log_dir) / "metrics.csv").read_text()
        assert "posterior/lpo_precision" in text
        assert "curvature/discarded_energy" in text

    def test_a_second_fit_drops_the_first_posterior(self, tmp_path):
        callback = BayesianMoECallback()
        module = ToyModule()
        trainer(tmp_path, [callback], max_epochs=1).fit(module, train_loader(), calibration_loader())
        first = callback.fitted.posterior.factors.fingerprint
        trainer(tmp_path, [callback], max_epochs=1).fit(module, train_loader(), calibration_loader())
        assert callback.fitted.posterior.factors.fingerprint != first

    def test_checkpoint_ensemble_keeps_the_last_epochs(self, tmp_path):
        callback = BayesianMoECallback(
            methods=("map", "checkpoint_ensemble"), num_snapshots=2, dirpath=str(tmp_path / "b")
        )
        module = ToyModule()
        run = trainer(tmp_path, [callback], max_epochs=4)
        run.fit(module, train_loader())
        files = sorted(path.name for path in (tmp_path / "b" / "snapshots").iterdir())
        assert files == ["epoch-0002.safetensors", "epoch-0003.safetensors"]
        before = [p.detach().clone() for p in module.parameters()]
        metrics = run.test(module, test_loader(), verbose=False)[0]
        assert metrics["checkpoint_ensemble/test/nll"] != pytest.approx(metrics["map/test/nll"], abs=1e-6)
        for one, other in zip(before, module.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)

    def test_mixed_precision_is_for_the_model_alone(self, tmp_path):
        seen = []

        class Watching(ToyModule):
            def class_logits(self, batch):
                seen.append(torch.is_autocast_enabled("cpu"))
                return super().class_logits(batch)

        callback = BayesianMoECallback(methods=LAPLACE)
        run = trainer(tmp_path, [callback], max_epochs=1, precision="bf16-mixed")
        module = Watching()
        run.fit(module, train_loader(), calibration_loader())
        assert callback.fitted.posterior.factors.layers[0].a_basis.dtype == torch.float32
        metrics = run.test(module, test_loader(), verbose=False)[0]
        assert 0 < metrics["laplace_lpo/test/nll"] < 3
        assert run.predict(module, test_loader())[0]["probs"].shape == (16, 3)
        assert all(seen)

    def test_a_trial_leaves_an_earlier_posterior_alone(self, tmp_path):
        folder = tmp_path / "b"
        options = {"methods": ("map", "laplace_evidence"), "dirpath": str(folder)}
        trainer(tmp_path, [BayesianMoECallback(**options)], max_epochs=1).fit(ToyModule(), train_loader())
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        trainer(tmp_path, [BayesianMoECallback(**options)], fast_dev_run=True).fit(ToyModule(seed=1), train_loader())
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

    def test_another_module_gets_a_prior_mean_of_its_own(self, tmp_path):
        def precision(callback, seed):
            L.seed_everything(0)
            trainer(tmp_path, [callback], max_epochs=1).fit(ToyModule(seed=seed), loader(160, 1))
            return callback.fitted.state.evidence_precision

        used = BayesianMoECallback(methods=("laplace_evidence",))
        precision(used, 0)
        fresh = BayesianMoECallback(methods=("laplace_evidence",))
        assert precision(used, 1) == pytest.approx(precision(fresh, 1), rel=1e-4)

    def test_a_resumed_checkpoint_ensemble_keeps_its_earlier_members(self, tmp_path):
        def run(epochs, **options):
            callback = BayesianMoECallback(methods=("map", "checkpoint_ensemble"), dirpath=str(tmp_path / "b"))
            checkpoint = ModelCheckpoint(tmp_path / "c", save_last=True, enable_version_counter=False)
            t = trainer(tmp_path, [checkpoint, callback], max_epochs=epochs, enable_checkpointing=True)
            t.fit(ToyModule(), train_loader(), **options)
            return [path.name for path in callback._files.snapshots]

        assert len(run(3)) == 3
        kept = run(4, ckpt_path=str(tmp_path / "c" / "last.ckpt"), weights_only=True)
        assert kept == [f"epoch-000{i}.safetensors" for i in range(4)]


class TestProgress:
    @pytest.mark.parametrize("enabled", [True, False])
    def test_shows_through_the_trainer_s_bar_only(self, tmp_path, capsys, enabled):
        run = trainer(tmp_path, [BayesianMoECallback()], max_epochs=1, enable_progress_bar=enabled)
        run.fit(ToyModule(), train_loader(), calibration_loader())
        captured = capsys.readouterr()
        assert ("Curvature" in captured.out + captured.err) == enabled

    def test_tqdm_bar(self, tmp_path, capsys):
        bar = L.pytorch.callbacks.TQDMProgressBar()
        run = trainer(tmp_path, [BayesianMoECallback(), bar], max_epochs=1, enable_progress_bar=True)
        run.fit(ToyModule(), train_loader(), calibration_loader())
        captured = capsys.readouterr()
        assert "Calibration" in captured.out + captured.err


class TestWeightsAndProcesses:
    def test_other_weights_are_refused(self, tmp_path):
        callback = BayesianMoECallback()
        module = ToyModule()
        run = trainer(tmp_path, [callback], max_epochs=1)
        run.fit(module, train_loader(), calibration_loader())
        with torch.no_grad():
            next(p for n, p in module.named_parameters() if "down_proj" in n).mul_(1.01)
        with pytest.raises(WeightMismatchError, match="other weights"):
            run.test(module, test_loader(), verbose=False)
        assert run.test_loop.inference_mode  # restored after the exception

    def test_best_weights(self, tmp_path):
        checkpoint = ModelCheckpoint(
            tmp_path / "checkpoints", monitor="val_loss", mode="max"
        )  # the worst, surely not last
        callback = BayesianMoECallback(fit_at="best")
        module = ToyModule()
        run = trainer(tmp_path, [callback, checkpoint], enable_checkpointing=True)
        run.fit(module, train_loader(), calibration_loader())
        last = [p.detach().clone() for p in module.parameters()]
        with pytest.raises(WeightMismatchError):
            run.test(module, test_loader(), verbose=False)
        for one, other in zip(last, module.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
        metrics = run.test(module, test_loader(), ckpt_path="best", weights_only=True, verbose=False)[0]
        assert "laplace_lpo/test/nll" in metrics

    def test_a_new_process_finds_the_posterior_by_its_folder(self, trained):
        callback = BayesianMoECallback(methods=LAPLACE, dirpath=str(trained.folder / "bayesian"))
        module = ToyModule()
        module.load_state_dict(trained.module.state_dict())
        metrics = trainer(trained.folder, [callback]).test(module, test_loader(), verbose=False)[0]
        for method in LAPLACE:
            assert metrics[f"{method}/test/nll"] == pytest.approx(trained.metrics[f"{method}/test/nll"], rel=1e-5)

    def test_a_new_process_finds_the_posterior_through_a_checkpoint(self, trained, tmp_path):
        path = tmp_path / "after.ckpt"
        trained.run.save_checkpoint(path)
        callback = BayesianMoECallback(methods=trained.callback.settings.methods)
        metrics = trainer(tmp_path, [callback]).test(
            ToyModule(seed=9), test_loader(), ckpt_path=str(path), weights_only=True, verbose=False
        )[0]
        assert metrics["laplace_lpo/test/nll"] == pytest.approx(trained.metrics["laplace_lpo/test/nll"], rel=1e-5)

    def test_testing_before_fitting_says_what_to_do(self, tmp_path):
        run = trainer(tmp_path, [BayesianMoECallback()])
        with pytest.raises(RuntimeError, match="fit_posterior"):
            run.test(ToyModule(), test_loader(), verbose=False)

    def test_fit_posterior_on_a_trained_model(self, trained, tmp_path):
        module = ToyModule()
        module.load_state_dict(trained.module.state_dict())
        callback = BayesianMoECallback(methods=("map", "laplace_lpo"))
        callback.fit_posterior(module, train_loader(), calibration_loader())
        metrics = trainer(tmp_path, [callback]).test(module, test_loader(), verbose=False)[0]
        assert metrics["laplace_lpo/test/nll"] == pytest.approx(trained.metrics["laplace_lpo/test/nll"], rel=1e-3)

    def test_fit_posterior_needs_the_prior_mean_for_the_evidence(self, trained):
        callback = BayesianMoECallback(methods=("laplace_evidence",))
        with pytest.raises(ValueError, match="prior_mean"):
            callback.fit_posterior(trained.module, train_loader())

    def test_the_prior_mean_survives_resuming(self, tmp_path):
        def run(epochs, folder, **options):
            L.seed_everything(1)
            callback = BayesianMoECallback(methods=("map", "laplace_evidence"), dirpath=str(folder))
            checkpoint = ModelCheckpoint(folder, save_last=True)
            t = trainer(tmp_path, [callback, checkpoint], max_epochs=epochs, enable_checkpointing=True)
            module = ToyModule()
            # No shuffling: the resumed run sees the batches in the order of the whole one.
            t.fit(module, loader(160, 1), calibration_loader(), **options)
            return callback.fitted.state.evidence_precision

        whole = run(3, tmp_path / "whole")
        run(2, tmp_path / "half")
        resumed = run(3, tmp_path / "rest", ckpt_path=str(tmp_path / "half" / "last.ckpt"), weights_only=True)
        assert resumed == pytest.approx(whole, rel=1e-4)

    def test_resuming_a_finished_run_says_that_nothing_was_fitted(self, tmp_path):
        checkpoint = ModelCheckpoint(tmp_path / "finished", save_last=True)
        t = trainer(tmp_path, [checkpoint], max_epochs=1, enable_checkpointing=True)
        t.fit(ToyModule(), train_loader(), calibration_loader())
        again = trainer(tmp_path, [BayesianMoECallback()], max_epochs=1)
        with pytest.warns(UserWarning, match="fit_posterior"):
            again.fit(
                ToyModule(),
                train_loader(),
                calibration_loader(),
                ckpt_path=str(tmp_path / "finished" / "last.ckpt"),
                weights_only=True,
            )

    def test_state_is_small_and_loads_without_pickle(self, trained, tmp_path):
        path = tmp_path / "state.ckpt"
        trained.run.save_checkpoint(path)
        state = torch.load(path, weights_only=True)["callbacks"][trained.callback.state_key]
        assert len(json.dumps(state)) < 1000

    def test_other_weights_are_refused_for_temperatures_too(self, tmp_path):
        options = {"methods": ("map", "temperature"), "dirpath": str(tmp_path / "b")}
        trainer(tmp_path, [BayesianMoECallback(**options)], max_epochs=1).fit(
            ToyModule(), train_loader(), calibration_loader()
        )
        with pytest.raises(WeightMismatchError, match="temperatures"):
            trainer(tmp_path, [BayesianMoECallback(**options)]).test(ToyModule(seed=5), test_loader(), verbose=False)

    def test_a_fit_with_other_settings_is_refused(self, trained):
        callback = BayesianMoECallback(methods=LAPLACE, rank=2, fisher="mc", dirpath=str(trained.folder / "bayesian"))
        with pytest.raises(ValueError, match=r"rank=10 \(here 2\), fisher='exact' \(here 'mc'\)"):
            trainer(trained.folder, [callback]).test(trained.module, test_loader(), verbose=False)

    def test_fewer_methods_can_be_tested_than_were_fitted(self, trained, tmp_path):
        path = tmp_path / "after.ckpt"
        trained.run.save_checkpoint(path)
        callback = BayesianMoECallback(methods=("map", "laplace_lpo"))
        metrics = trainer(tmp_path, [callback]).test(
            ToyModule(seed=9), test_loader(), ckpt_path=str(path), weights_only=True, verbose=False
        )[0]
        assert "laplace_lpo/test/nll" in metrics

    def test_fit_posterior_writes_where_it_was_told_to(self, trained, tmp_path):
        callback = BayesianMoECallback(dirpath=str(tmp_path / "b"))
        callback.fit_posterior(trained.module, train_loader(), calibration_loader())
        again = BayesianMoECallback(dirpath=str(tmp_path / "b"))
        metrics = trainer(tmp_path, [again]).test(trained.module, test_loader(), verbose=False)[0]
        assert "laplace_lpo/test/nll" in metrics

    def test_entropy_belongs_to_the_probabilities_under_any_link(self, trained):
        callback = BayesianMoECallback(methods=LAPLACE, link="probit", dirpath=str(trained.folder / "bayesian"))
        first = trainer(trained.folder, [callback]).predict(trained.module, test_loader())[0]
        torch.testing.assert_close(first["entropy"], -(first["probs"] * first["log_probs"]).sum(1))


class SaveWeights(L.Callback):
    def __init__(self, path):
        self.path = path

    def on_train_end(self, trainer, pl_module):
        torch.save(pl_module.state_dict(), self.path)


class Mortal(ToyModule):
    """Is killed in a forward pass after training; counts those it survived."""

    def __init__(self, lives=None):
        super().__init__()
        self.lives = lives
        self.passes = 0

    def class_logits(self, batch):
        if not self.training:
            if self.passes == self.lives:
                raise RuntimeError("killed")
            self.passes += 1
        return super().class_logits(batch)

    def validation_step(self, batch, batch_idx):
        return None


CHECKPOINTED = {"methods": LAPLACE, "curvature_checkpoint_every": 4, "fisher": "mc"}


class TestKilledInTheCurvatureEpoch:
    """Ten batches, written every four."""

    def run(self, folder, module, data=None, **options):
        callback = BayesianMoECallback(**{**CHECKPOINTED, **options}, dirpath=str(folder / "bayesian"))
        callbacks = [SaveWeights(folder / "weights.pt"), callback]
        L.seed_everything(0, verbose=False)
        trainer(folder, callbacks, max_epochs=1, num_sanity_val_steps=0).fit(
            module, data or train_loader(), calibration_loader()
        )
        return callback

    def killed(self, folder, lives, data=None):
        folder.mkdir(exist_ok=True)
        with pytest.raises(RuntimeError, match="killed"):
            self.run(folder, Mortal(lives), data)
        torch.manual_seed(77)  # the state that a killed process leaves is nobody's
        return folder / "bayesian"

    def go_on(self, folder, data, **options):
        pretrained = ToyModule()
        module = Mortal()
        module.load_state_dict(torch.load(folder / "weights.pt"))
        callback = BayesianMoECallback(**{**CHECKPOINTED, **options}, dirpath=str(folder / "bayesian"))
        prior_mean = {n: p.detach() for n, p in pretrained.named_parameters() if "experts.down_proj" in n}
        callback.fit_posterior(module, data, calibration_loader(), prior_mean=prior_mean)
        return module.passes

    @pytest.mark.parametrize(("lives", "kept"), [(2, 0), (9, 8), (10, 10), (12, 10)])
    def test_fit_posterior_goes_on_to_the_same_bits(self, tmp_path, lives, kept):
        whole = tmp_path / "whole"
        whole.mkdir()
        self.run(whole, Mortal(), curvature_checkpoint_every=None)
        folder = self.killed(tmp_path / "killed", lives)
        assert [p.name for p in folder.glob("*")] == (["curvature.safetensors"] if kept else [])
        assert self.go_on(tmp_path / "killed", train_loader()) == 10 + 7 - kept
        for name in ("posterior.safetensors", "methods.json"):
            assert (folder / name).read_bytes() == (whole / "bayesian" / name).read_bytes()
        assert {p.name for p in folder.iterdir()} == {"posterior.safetensors", "methods.json"}

    @pytest.mark.parametrize("own_generator", [False, True])
    def test_a_generator_over_a_loader(self, tmp_path, own_generator):
        def batches(data):
            for batch in data:
                yield dict(batch)

        for number, way in enumerate((batches, iter, lambda data: (dict(batch) for batch in data))):
            folder = tmp_path / str(number)
            generator = torch.Generator().manual_seed(number) if own_generator else None
            data = DataLoader(ToyData(160, 1), batch_size=16, shuffle=True, generator=generator)
            self.killed(folder, 9, data)
            with reproducible_order(data):
                assert self.go_on(folder, way(data)) == 9

    def test_another_order_is_refused(self, tmp_path):
        folder = self.killed(tmp_path, 9)
        with pytest.raises(ValueError, match=r"in another order than in the pass that wrote .*curvature.safetensors"):
            self.go_on(tmp_path, loader(160, 1))
        assert [p.name for p in folder.iterdir()] == ["curvature.safetensors"]

    def test_training_again_drops_the_sums_of_earlier_weights(self, tmp_path):
        folder = self.killed(tmp_path, 9)
        (folder / "curvature-rank1of2.safetensors").write_bytes(b"of a run on two devices")
        callback = BayesianMoECallback(**CHECKPOINTED, dirpath=str(folder))
        trainer(tmp_path, [callback], max_epochs=1).fit(ToyModule(seed=5), train_loader(), calibration_loader())
        assert {p.name for p in folder.iterdir()} == {"posterior.safetensors", "methods.json"}

    def test_a_fast_dev_run_leaves_them_alone(self, tmp_path):
        folder = self.killed(tmp_path, 9)
        before = (folder / "curvature.safetensors").read_bytes()
        callback = BayesianMoECallback(**{**CHECKPOINTED, "curvature_checkpoint_every": 1}, dirpath=str(folder))
        trainer(tmp_path, [callback], fast_dev_run=True).fit(ToyModule(), train_loader(), calibration_loader())
        assert [p.name for p in folder.iterdir()] == ["curvature.safetensors"]
        assert (folder / "curvature.safetensors").read_bytes() == before

    def test_fit_posterior_without_a_folder_writes_nothing(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        callback = BayesianMoECallback(methods=("map", "laplace_lpo"), curvature_checkpoint_every=1)
        with pytest.warns(UserWarning, match="writes into the callback's dirpath"):
            callback.fit_posterior(ToyModule(), train_loader(), calibration_loader())
        assert list(tmp_path.iterdir()) == []


def test_accumulated_gradients(tmp_path):
    """The curvature is that of the examples, however many batches a step takes."""
    callback = BayesianMoECallback(methods=("map", "laplace_evidence"))
    module = ToyModule().double()
    module.network.set_experts_implementation("eager")  # the default has no float64
    run = trainer(tmp_path, [callback], accumulate_grad_batches=3, max_epochs=1, precision="64-true")
    run.fit(module, train_loader())
    assert run.global_step == 4
    found = callback.fitted.posterior.factors
    assert found.num_examples_used == 160
    expected = collect_factors(module, lambda m, b: m.class_logits(b), loader(160, 1, batch_size=3), rank=10)
    for one, other in zip(found.layers, expected.layers, strict=True):
        assert torch.equal(one.slots, other.slots)
        for basis, eigenvalues in (("a_basis", "a_eigenvalues"), ("g_basis", "g_eigenvalues")):
            a, b = (
                getattr(x, basis) @ torch.diag_embed(getattr(x, eigenvalues)) @ getattr(x, basis).mT
                for x in (one, other)
            )
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11 * float(b.abs().max()))


class TestException:
    def test_everything_is_restored_when_the_fit_fails(self, tmp_path):
        class Failing(ToyModule):
            calls_after_training = 0

            def class_logits(self, batch):
                if not self.training:
                    self.calls_after_training += 1
                    if self.calls_after_training > 3:
                        raise RuntimeError("a broken batch")
                return super().class_logits(batch)

            def validation_step(self, batch, batch_idx):
                return None

        module = Failing()
        run = trainer(tmp_path, [BayesianMoECallback()], max_epochs=1)
        with pytest.raises(RuntimeError, match="a broken batch"):
            run.fit(module, train_loader(), calibration_loader())
        assert all(child.training for child in module.modules())
        assert all(parameter.requires_grad for parameter in module.parameters())
        assert module.network.get_experts_implementation() == {"": "grouped_mm"}
        assert run.test_loop.inference_mode

    def test_predict_step_is_restored_when_prediction_fails(self, trained):
        broken = DataLoader([{"labels": torch.tensor(0)}])
        with pytest.raises(KeyError):
            trained.run.predict(trained.module, broken)
        assert "predict_step" not in vars(trained.module)


class TestRefusals:
    def test_module_without_class_logits(self, tmp_path):
        class Plain(ToyModule):
            class_logits = None

        with pytest.raises(TypeError, match="class_logits"):
            trainer(tmp_path, [BayesianMoECallback()]).fit(Plain(), train_loader(), calibration_loader())

    def test_class_logits_as_an_argument(self, tmp_path):
        class Renamed(ToyModule):
            def scores(self, batch):
                return ToyModule.class_logits(self, batch)

            def training_step(self, batch, batch_idx):
                logits, labels = self.scores(batch)
                return torch.nn.functional.cross_entropy(logits, labels)

            def validation_step(self, batch, batch_idx):
                return None

            class_logits = None

        callback = BayesianMoECallback(class_logits=lambda module, batch: module.scores(batch))
        trainer(tmp_path, [callback], max_epochs=1).fit(Renamed(), train_loader(), calibration_loader())
        assert callback.fitted is not None

    def test_model_without_experts(self, tmp_path):
        class NoExperts(ToyModule):
            def __init__(self):
                super().__init__()
                self.network = torch.nn.Linear(2, 2)

        with pytest.raises(ValueError, match="no expert layers"):
            trainer(tmp_path, [BayesianMoECallback()]).fit(NoExperts(), train_loader(), calibration_loader())

    def test_no_validation_data_is_noticed_before_training(self, tmp_path):
        module = ToyModule()
        before = next(module.parameters()).clone()
        with pytest.raises(ValueError, match="validation split"):
            trainer(tmp_path, [BayesianMoECallback()]).fit(module, train_loader())
        torch.testing.assert_close(next(module.parameters()), before)

    def test_too_few_inputs_for_the_evidence_temperature_are_noticed_before_training(self, tmp_path):
        module = ToyModule()
        before = next(module.parameters()).clone()
        callback = BayesianMoECallback(methods=("map", "evidence_temperature"))
        with pytest.raises(ValueError, match="at least 100 inputs"):
            trainer(tmp_path, [callback]).fit(module, train_loader(), loader(48, 2))
        torch.testing.assert_close(next(module.parameters()), before)

    def test_endless_training_data_need_a_cap(self, tmp_path):
        class Stream(IterableDataset):
            def __iter__(self):
                data = ToyData(64, 1)
                return (data[i % 64] for i in range(10_000))

        options = {"max_steps": 4, "max_epochs": None}
        stream = DataLoader(Stream(), batch_size=16)
        with pytest.raises(RuntimeError, match="curvature_batches"):
            trainer(tmp_path, [BayesianMoECallback()], **options).fit(ToyModule(), stream, calibration_loader())
        callback = BayesianMoECallback(curvature_batches=3)
        trainer(tmp_path, [callback], **options).fit(ToyModule(), stream, calibration_loader())
        assert callback.fitted.posterior.factors.num_examples == 48

    def test_several_validation_loaders(self, tmp_path):
        class Lists(ToyModule):
            def validation_step(self, batch, batch_idx, dataloader_idx=0):
                return None

        with pytest.raises(RuntimeError, match="validation loader"):
            trainer(tmp_path, [BayesianMoECallback()]).fit(
                Lists(), train_loader(), [calibration_loader(), calibration_loader()]
            )

    def test_sharded_strategies(self):
        for kind in (FSDPStrategy, DeepSpeedStrategy):
            fake = types.SimpleNamespace(strategy=kind.__new__(kind), world_size=1)
            with pytest.raises(ValueError, match=kind.__name__):
                check_strategy(fake)

    def test_several_processes_without_ddp(self):
        fake = types.SimpleNamespace(strategy=object(), world_size=2)
        with pytest.raises(ValueError, match="with DDP and with ModelParallelStrategy"):
            check_strategy(fake)

    def test_callbacks_that_change_weights_must_come_first(self, tmp_path):
        averaging = StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=1)
        with pytest.raises(ValueError, match="StochasticWeightAveraging"):
            trainer(tmp_path, [BayesianMoECallback(), averaging]).fit(ToyModule(), train_loader(), calibration_loader())

    def test_nan_in_the_loss_stops_training_at_once(self, tmp_path):
        class Broken(ToyModule):
            def training_step(self, batch, batch_idx):
                return super().training_step(batch, batch_idx) * float("nan")

        run = trainer(tmp_path, [BayesianMoECallback()], max_epochs=5)
        with pytest.raises(ValueError, match="NaN at step 1 "):
            run.fit(Broken(), train_loader(), calibration_loader())

    def test_one_epoch_makes_no_checkpoint_ensemble(self, tmp_path):
        callback = BayesianMoECallback(methods=("map", "checkpoint_ensemble"))
        with pytest.raises(ValueError, match="max_epochs=1"):
            trainer(tmp_path, [callback], max_epochs=1).fit(ToyModule(), train_loader())

    def test_subclasses_of_weight_averaging(self):
        averaging = pytest.importorskip("lightning.pytorch.callbacks.weight_averaging")
        kind = type("Mine", (averaging.WeightAveraging,), {})
        with pytest.raises(ValueError, match="Mine changes the weights"):
            check_later_callbacks([kind.__new__(kind)])

    def test_experts_that_only_the_user_can_name(self, tmp_path):
        class Square(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.router = torch.nn.Linear(8, 3)
                make = lambda: torch.nn.ModuleDict({"up": torch.nn.Linear(8, 8), "out": torch.nn.Linear(8, 8)})  # noqa: E731
                self.mlps = torch.nn.ModuleList(make() for _ in range(3))

            def forward(self, x):
                weight, chosen = self.router(x).softmax(-1).max(-1)
                y = torch.zeros_like(x)
                for i, mlp in enumerate(self.mlps):
                    rows = (chosen == i).nonzero().squeeze(1)
                    y = y.index_copy(0, rows, mlp["out"](mlp["up"](x[rows]).relu()))
                return y * weight.unsqueeze(1)

        class Module(ToyModule):
            def __init__(self):
                super().__init__()
                self.network = torch.nn.Sequential(torch.nn.Embedding(24, 8), Square(), torch.nn.Linear(8, 3))

            def class_logits(self, batch):
                return self.network(batch["input_ids"][:, 0]), batch.get("labels")

        with pytest.raises(ValueError, match="down_proj="):
            trainer(tmp_path, [BayesianMoECallback()], max_epochs=1).fit(Module(), train_loader(), calibration_loader())
        callback = BayesianMoECallback(methods=LAPLACE, experts="*mlps", down_proj="out")
        module = Module()
        run = trainer(tmp_path, [callback], max_epochs=1)
        run.fit(module, train_loader(), calibration_loader())
        assert "laplace_lpo/test/nll" in run.test(module, test_loader(), verbose=False)[0]

    def test_best_without_a_monitor(self, tmp_path):
        with pytest.raises(ValueError, match="monitor"):
            trainer(tmp_path, [BayesianMoECallback(fit_at="best")]).fit(
                ToyModule(), train_loader(), calibration_loader()
            )

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"methods": ("map", "magic")}, "magic"),
            ({"methods": ()}, "methods"),
            ({"methods": ("map", "map")}, "distinct"),
            ({"rank": 0}, "rank"),
            ({"fisher": "type3"}, "fisher"),
            ({"sketch": "svd"}, "sketch"),
            ({"link": "logit"}, "link"),
            ({"fit_at": "middle"}, "fit_at"),
            ({"curvature_batches": 0}, "curvature_batches"),
            ({"curvature_checkpoint_every": 0}, "curvature_checkpoint_every must be at least 1, got 0"),
            ({"methods": ("mc_dropout",), "dropout": 0.0}, "dropout"),
            ({"methods": ("deep_ensemble",)}, "ensemble_members"),
            ({"methods": ("checkpoint_ensemble",), "num_snapshots": 1}, "snapshots"),
            ({"methods": ("evidence_temperature",), "fisher": "mc"}, "exact"),
        ],
    )
    def test_bad_arguments(self, options, message):
        with pytest.raises(ValueError, match=message):
            BayesianMoECallback(**options)

    def test_skipping_a_layer_that_is_not_there(self, tmp_path):
        with pytest.raises(ValueError, match="skip_layers"):
            trainer(tmp_path, [BayesianMoECallback(skip_layers=(7,))]).fit(
                ToyModule(), train_loader(), calibration_loader()
            )


class TestTwoCallbacks:
    def test_need_different_names(self, tmp_path):
        callbacks = [BayesianMoECallback(rank=2), BayesianMoECallback(rank=4)]
        with pytest.raises(RuntimeError, match="more than one stateful callback"):
            trainer(tmp_path, callbacks).fit(ToyModule(), train_loader(), calibration_loader())

    def test_work_side_by_side(self, tmp_path):
        callbacks = [BayesianMoECallback(rank=1, name="one"), BayesianMoECallback(skip_layers=(0,), name="last")]
        module = ToyModule()
        run = trainer(tmp_path, callbacks, max_epochs=1)
        run.fit(module, train_loader(), calibration_loader())
        metrics = run.test(module, test_loader(), verbose=False)[0]
        assert metrics["one/map/test/nll"] == metrics["last/map/test/nll"]
        assert metrics["one/laplace_lpo/test/nll"] != metrics["last/laplace_lpo/test/nll"]
        assert len(callbacks[1].fitted.posterior.factors.layers) == 1
        assert (tmp_path / "bayesian_moe" / "one" / "posterior.safetensors").is_file()


class TestOutside:
    def test_tensorboard_has_a_sub_run_for_each_method(self, tmp_path):
        logger = TensorBoardLogger(tmp_path, name="", version="run", default_hp_metric=False)
        callback = BayesianMoECallback(methods=("map", "laplace_evidence"))
        module = ToyModule()
        run = trainer(tmp_path, [callback], logger=logger, max_epochs=1)
        run.fit(module, train_loader(), calibration_loader())
        metrics = run.test(module, test_loader(), verbose=False)[0]
        for method in ("map", "laplace_evidence"):
            events = EventAccumulator(str(tmp_path / "run" / "methods" / method))
            events.Reload()
            assert events.Scalars("test/nll")[0].value == pytest.approx(metrics[f"{method}/test/nll"])

    def test_arguments_can_be_written_in_yaml(self):
        jsonargparse = pytest.importorskip("jsonargparse")
        parser = jsonargparse.ArgumentParser(exit_on_error=False)
        parser.add_subclass_arguments(L.Callback, "callback")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = parser.parse_string(
                "callback:\n"
                "  class_path: bmoe_lightning.callback.BayesianMoECallback\n"
                "  init_args:\n"
                "    methods: [map, laplace_lpo]\n"
                "    rank: 4\n"
                "    fisher: mc\n"
                "    skip_layers: [0]\n"
            )
            callback = parser.instantiate_classes(config).callback
        assert (callback.settings.rank, callback.settings.fisher) == (4, "mc")
        assert callback.settings.skip_layers == (0,)


def test_factors_that_take_less_memory(tmp_path):
    """Fitted, saved, found again by another callback; one with another dtype refuses them."""
    options = {"methods": ("map", "laplace_lpo"), "dirpath": str(tmp_path / "bayesian"), "offload_factors": True}
    callback = BayesianMoECallback(factor_dtype="bfloat16", **options)
    plain = BayesianMoECallback(options["methods"], name="plain", dirpath=str(tmp_path / "plain"))
    module = ToyModule()
    run = trainer(tmp_path, [callback, plain])
    run.fit(module, train_loader(), calibration_loader())
    metrics = run.test(module, test_loader(), verbose=False)[0]
    for name in ("laplace_lpo/test/nll", "laplace_lpo/test/brier"):
        assert metrics[name] == pytest.approx(metrics[f"plain/{name}"], rel=1e-3)
    other = BayesianMoECallback(factor_dtype="bfloat16", **options)
    again = trainer(tmp_path, [other]).test(module, test_loader(), verbose=False)[0]
    assert again["laplace_lpo/test/nll"] == pytest.approx(metrics["laplace_lpo/test/nll"], rel=1e-6)
    assert other.fitted.posterior.offload
    assert other.fitted.posterior.factors.layers[0].a_basis.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"factor_dtype='bfloat16' \(here 'float32'\)"):
        trainer(tmp_path, [BayesianMoECallback(**options)]).test(module, test_loader(), verbose=False)
