"""The callback through the trainer, as a user runs it, and every trap that Lightning holds for it."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader
from toy import (
    LAPLACE,
    ToyData,
    ToyModule,
    calibration_loader,
    loader,
    test_loader,
    train_loader,
    trainer,
)

from bmoe_lightning.callback import BayesianMoECallback
from bmoe_lightning.curvature import Curvature, collect_factors
from bmoe_lightning.experts import find_expert_layers
from bmoe_lightning.laplace import LaplacePosterior
from bmoe_lightning.methods import CheckpointEnsemble, LaplaceLPO, NotFittedError
from bmoe_lightning.methods.snapshots import read_snapshot


def plain_metrics(module):
    """Accuracy and NLL of the module itself on the test data, computed here."""
    data = ToyData(48, 3)
    with torch.no_grad():
        logits, labels = module.eval().class_logits({"input_ids": data.ids, "labels": data.labels})
    module.train()
    return (logits.argmax(1) == labels).double().mean(), torch.nn.functional.cross_entropy(logits.double(), labels)


def only_posterior(callback):
    (posterior,) = callback.fitted.posteriors.values()
    return posterior


class TestAfterTraining:
    def test_logs_four_metrics_for_each_method(self, trained):
        for method in trained.callback.methods:
            for metric in ("acc", "ece", "nll", "brier"):
                assert f"{method.name}/test/{metric}" in trained.metrics

    def test_map_is_the_module_itself(self, trained):
        accuracy, nll = plain_metrics(trained.module)
        assert trained.metrics["map/test/acc"] == pytest.approx(float(accuracy))
        assert trained.metrics["map/test/nll"] == pytest.approx(float(nll), rel=1e-5)

    def test_laplace_predictions_are_the_posterior_s(self, trained):
        batch = next(iter(test_loader()))
        precision = trained.callback.fitted.methods["laplace_evidence"].state["prior_precision"]
        posterior = only_posterior(trained.callback).with_prior_precision(precision)
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
        # At the prior precision of the first method that has one.
        expected = trained.callback.predictions["test"]["laplace_evidence"].log_probs[: len(found)]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    def test_validation_after_training_predicts_too(self, trained):
        metrics = trained.run.validate(trained.module, test_loader(), verbose=False)[0]
        assert metrics["laplace_lpo/val/nll"] == pytest.approx(trained.metrics["laplace_lpo/test/nll"])

    def test_predict_is_the_module_s_own_unless_a_method_is_named(self, trained):
        outputs = trained.run.predict(trained.module, test_loader())
        torch.testing.assert_close(outputs[0], trained.module.predict_step(next(iter(test_loader())), 0))

    def test_predict_returns_probabilities_with_uncertainty(self, trained):
        callback = BayesianMoECallback(LAPLACE, predict_method="laplace_lpo", dirpath=str(trained.folder / "bayesian"))
        first = trainer(trained.folder, [callback]).predict(trained.module, test_loader())[0]
        assert first["method"] == "laplace_lpo"
        own_step = trained.module.predict_step(next(iter(test_loader())), 0)
        torch.testing.assert_close(first["step_output"], own_step)
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
        factors = only_posterior(callback).factors
        assert (factors.num_examples_used, factors.num_examples) == (48, 48)

    def test_capped_curvature_stands_for_the_whole(self, tmp_path):
        callback = BayesianMoECallback(curvature=Curvature(max_batches=2))
        trainer(tmp_path, [callback], max_epochs=1).fit(ToyModule(), train_loader(), calibration_loader())
        factors = only_posterior(callback).factors
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
        callback = BayesianMoECallback(("map", LaplaceLPO(scope="global")))
        trainer(tmp_path, [callback], logger=logger, max_epochs=1).fit(
            ToyModule(), train_loader(), calibration_loader()
        )
        text = (Path(logger.log_dir) / "metrics.csv").read_text()
        assert "posterior/laplace_lpo/prior_precision" in text
        assert "curvature/discarded_energy" in text

    def test_a_second_fit_drops_the_first_posterior(self, tmp_path):
        callback = BayesianMoECallback()
        module = ToyModule()
        trainer(tmp_path, [callback], max_epochs=1).fit(module, train_loader(), calibration_loader())
        first = callback.fitted.fingerprint
        trainer(tmp_path, [callback], max_epochs=1).fit(module, train_loader(), calibration_loader())
        assert callback.fitted.fingerprint != first

    def test_checkpoint_ensemble_keeps_the_last_epochs(self, tmp_path):
        callback = BayesianMoECallback(
            methods=("map", CheckpointEnsemble(num_snapshots=2)), dirpath=str(tmp_path / "b")
        )
        module = ToyModule()
        run = trainer(tmp_path, [callback], max_epochs=4)
        run.fit(module, train_loader())
        files = sorted(path.name for path in (tmp_path / "b" / "snapshots").iterdir())
        assert [name[9:19] for name in files] == ["epoch-0002", "epoch-0003"]
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
        assert only_posterior(callback).factors.layers[0].a_basis.dtype == torch.float32
        metrics = run.test(module, test_loader(), verbose=False)[0]
        callback.predict_method = "laplace_lpo"
        assert run.predict(module, test_loader())[0]["probs"].shape == (16, 3)
        assert all(seen)
        _, nll = plain_metrics(module)
        assert metrics["map/test/nll"] == pytest.approx(float(nll), rel=0.05)  # bfloat16
        assert metrics["laplace_lpo/test/nll"] != metrics["map/test/nll"]

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
            return callback.fitted.methods["laplace_evidence"].state["prior_precision"].tolist()

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
            return {path.name[9:19]: read_snapshot(path) for path in (tmp_path / "b" / "snapshots").iterdir()}

        first = run(3)
        resumed = run(4, ckpt_path=str(tmp_path / "c" / "last.ckpt"), weights_only=True)
        assert set(first) == {f"epoch-000{i}" for i in range(3)}
        assert set(resumed) == {f"epoch-000{i}" for i in range(4)}
        for epoch, weights in first.items():
            torch.testing.assert_close(resumed[epoch], weights, rtol=0, atol=0)


def test_kappa_is_of_the_weights_that_the_optimizer_has(tmp_path):
    class OnlyExperts(ToyModule):
        def configure_optimizers(self):
            return torch.optim.SGD(
                [p for name, p in self.named_parameters() if name.endswith("experts.down_proj")], lr=0.1
            )

    callback = BayesianMoECallback()
    module = OnlyExperts()
    assert all(p.requires_grad for p in module.parameters())
    trainer(tmp_path, [callback], max_epochs=1).fit(module, train_loader(), calibration_loader())
    assert [share.kappa for share in callback.fitted.shares.values()] == [1]


class TestProgress:
    @pytest.mark.parametrize("enabled", [True, False])
    def test_shows_through_the_trainer_s_bar_only(self, tmp_path, capsys, enabled):
        run = trainer(tmp_path, [BayesianMoECallback()], max_epochs=1, enable_progress_bar=enabled)
        run.fit(ToyModule(), train_loader(), calibration_loader())
        captured = capsys.readouterr()
        assert ("Curvature" in captured.out + captured.err) == enabled
        told = [line for line in captured.err.splitlines() if line.startswith("posterior over")]
        (line,) = told  # a result, and no progress
        assert line.startswith("posterior over 2 layers of 4 experts: 8 of 8 experts seen, ")
        assert " % of the trained weights' gradient (kappa " in line
        assert line.endswith(" weights were trained")

    def test_tqdm_bar(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        bar = L.pytorch.callbacks.TQDMProgressBar()
        run = trainer(tmp_path, [BayesianMoECallback(), bar], max_epochs=1, enable_progress_bar=True)
        run.fit(ToyModule(), train_loader(), calibration_loader())
        captured = capsys.readouterr()
        assert "Calibration" in captured.out + captured.err


def test_accumulated_gradients(tmp_path):
    """The curvature is that of the examples, however many batches a step takes."""
    callback = BayesianMoECallback(methods=("map", "laplace_evidence"))
    module = ToyModule().double()
    module.network.set_experts_implementation("eager")  # the default has no float64
    run = trainer(tmp_path, [callback], accumulate_grad_batches=3, max_epochs=1, precision="64-true")
    run.fit(module, train_loader())
    assert run.global_step == 4
    found = only_posterior(callback).factors
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
        callback = BayesianMoECallback(predict_method="map", dirpath=str(trained.folder / "bayesian"))
        with pytest.raises(KeyError):
            trainer(trained.folder, [callback]).predict(trained.module, broken)
        assert "predict_step" not in vars(trained.module)


class TestTwoCallbacks:
    def test_need_different_names(self, tmp_path):
        callbacks = [BayesianMoECallback(curvature=Curvature(rank=rank)) for rank in (2, 4)]
        with pytest.raises(RuntimeError, match="more than one stateful callback"):
            trainer(tmp_path, callbacks).fit(ToyModule(), train_loader(), calibration_loader())

    def test_work_side_by_side(self, tmp_path):
        callbacks = [
            BayesianMoECallback(curvature=Curvature(rank=1), name="one"),
            BayesianMoECallback(curvature=Curvature(skip_layers=(0,)), name="last"),
        ]
        module = ToyModule()
        run = trainer(tmp_path, callbacks, max_epochs=1)
        run.fit(module, train_loader(), calibration_loader())
        metrics = run.test(module, test_loader(), verbose=False)[0]
        assert metrics["one/map/test/nll"] == metrics["last/map/test/nll"]
        assert metrics["one/laplace_lpo/test/nll"] != metrics["last/laplace_lpo/test/nll"]
        assert len(only_posterior(callbacks[1]).factors.layers) == 1
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
                "    methods:\n"
                "    - map\n"
                "    - laplace_lpo\n"
                "    - class_path: bmoe_lightning.methods.laplace_lpo.LaplaceLPO\n"
                "      init_args: {name: lpo_probit, link: probit}\n"
                "    curvature: {rank: 4, fisher: mc, skip_layers: [0]}\n"
                "    predict_method: lpo_probit\n"
            )
            callback = parser.instantiate_classes(config).callback
        assert [method.name for method in callback.methods] == ["map", "laplace_lpo", "lpo_probit"]
        assert callback.methods[2].link == "probit"
        expected = Curvature(rank=4, fisher="mc", skip_layers=(0,))
        assert [method.curvatures for method in callback.methods] == [(), (expected,), (expected,)]


def test_factors_that_take_less_memory(tmp_path):
    """Fitted, saved, found again by another callback; one with another dtype refuses them."""
    options = {"methods": ("map", "laplace_lpo"), "dirpath": str(tmp_path / "bayesian")}
    small = Curvature(factor_dtype="bfloat16", offload=True)
    callback = BayesianMoECallback(curvature=small, **options)
    plain = BayesianMoECallback(options["methods"], name="plain", dirpath=str(tmp_path / "plain"))
    module = ToyModule()
    run = trainer(tmp_path, [callback, plain])
    run.fit(module, train_loader(), calibration_loader())
    metrics = run.test(module, test_loader(), verbose=False)[0]
    for name in ("laplace_lpo/test/nll", "laplace_lpo/test/brier"):
        assert metrics[name] == pytest.approx(metrics[f"plain/{name}"], rel=1e-3)
    other = BayesianMoECallback(curvature=small, **options)
    again = trainer(tmp_path, [other]).test(module, test_loader(), verbose=False)[0]
    assert again["laplace_lpo/test/nll"] == pytest.approx(metrics["laplace_lpo/test/nll"], rel=1e-6)
    assert only_posterior(other).offload
    assert only_posterior(other).factors.layers[0].a_basis.dtype == torch.bfloat16
    with pytest.raises(
        NotFittedError,
        match=r"laplace_lpo was fitted with other options: curvature\.factor_dtype='bfloat16' \(here 'float32'\)",
    ):
        trainer(tmp_path, [BayesianMoECallback(**options)]).test(module, test_loader(), verbose=False)
