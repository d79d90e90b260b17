"""What another process, another fit or another run finds of what the callback wrote."""

from __future__ import annotations

import copy
import json
import pickle
import types
from contextlib import nullcontext

import lightning as L
import lightning.pytorch.callbacks
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim.swa_utils import get_ema_avg_fn
from torch.utils.data import DataLoader
from toy import (
    LAPLACE,
    ToyData,
    ToyModule,
    calibration_loader,
    loader,
    test_loader,
    toy_model,
    train_loader,
    trainer,
)

from bmoe_lightning.callback import BayesianMoECallback
from bmoe_lightning.curvature import Curvature
from bmoe_lightning.laplace import WeightMismatchError
from bmoe_lightning.methods import LaplaceEvidence, LaplaceLPO, NotFittedError
from bmoe_lightning.methods.storage import load_fit


def fit_posterior(callback, run, module, data=None, **options):
    loaders = {"train_dataloaders": data or train_loader(), "val_dataloaders": calibration_loader()}
    callback.fit_posterior(module, trainer=run, **loaders, **options)


class BuiltLate(ToyModule):
    """Has no model before `configure_model`."""

    def __init__(self):
        super().__init__()
        del self.network

    def configure_model(self):
        if not hasattr(self, "network"):
            self.network = toy_model()


class LoadedLate(BuiltLate):
    """Loads its pretrained weights in `configure_model`."""

    def configure_model(self):
        if not hasattr(self, "network"):
            self.network = toy_model(seed=5)
            self.load_state_dict(ToyModule().state_dict())


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

    def test_a_fitted_callback_can_be_pickled(self, trained):
        """Strategies that spawn processes pickle it, and they predict with it."""
        copied = pickle.loads(pickle.dumps(trained.callback))
        expected = trained.run.test(trained.module, test_loader(), verbose=False)
        assert trainer(trained.folder, [copied]).test(trained.module, test_loader(), verbose=False) == expected
        assert {"laplace_evidence", "laplace_lpo"} <= set(copied.fitted.methods)

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

    @pytest.mark.parametrize("kept", ["hyperparameters", "on_save_checkpoint"])
    def test_best_weights_that_could_not_be_loaded_are_refused_early(self, tmp_path, kept):
        class Configured(ToyModule):
            epochs = 0

            def __init__(self, config=None):
                super().__init__()
                if kept == "hyperparameters":
                    self.save_hyperparameters()
                self.config = config

            def on_save_checkpoint(self, checkpoint):
                if kept == "on_save_checkpoint":
                    checkpoint["config"] = self.config

            def on_train_epoch_start(self):
                self.epochs += 1

        checkpoint = ModelCheckpoint(tmp_path / "checkpoints", monitor="val_loss")
        module = Configured(types.SimpleNamespace(rate=0.1))
        run = trainer(
            tmp_path, [BayesianMoECallback(fit_at="best"), checkpoint], enable_checkpointing=True, max_epochs=3
        )
        with pytest.raises(RuntimeError, match=r"objects of types.SimpleNamespace, and unpickling"):
            run.fit(module, train_loader(), calibration_loader())
        assert module.epochs == (0 if kept == "hyperparameters" else 1)

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
        callback = BayesianMoECallback(methods=trained.callback.methods)
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
        run = trainer(tmp_path, [callback])
        fit_posterior(callback, run, module)
        metrics = run.test(module, test_loader(), verbose=False)[0]
        assert metrics["laplace_lpo/test/nll"] == pytest.approx(trained.metrics["laplace_lpo/test/nll"], rel=1e-3)

    def test_fit_posterior_needs_the_prior_mean_for_the_evidence(self, trained, tmp_path):
        callback = BayesianMoECallback(methods=("laplace_evidence",))
        with pytest.raises(ValueError, match="equal the prior mean"):
            fit_posterior(callback, trainer(tmp_path, [callback]), trained.module)

    @pytest.mark.parametrize("kind", [ToyModule, BuiltLate, LoadedLate])
    def test_the_prior_mean_survives_resuming(self, tmp_path, kind):
        def run(epochs, folder, kind=kind, **options):
            L.seed_everything(1)
            callback = BayesianMoECallback(methods=("map", "laplace_evidence"), dirpath=str(folder))
            checkpoint = ModelCheckpoint(folder, save_last=True)
            t = trainer(tmp_path, [callback, checkpoint], max_epochs=epochs, enable_checkpointing=True)
            module = kind()
            # No shuffling: the resumed run sees the batches in the order of the whole one.
            t.fit(module, loader(160, 1), calibration_loader(), **options)
            assert not module._load_state_dict_pre_hooks
            return callback.fitted.methods["laplace_evidence"].state["prior_precision"].tolist()

        whole = run(3, tmp_path / "whole")
        assert whole == run(3, tmp_path / "early", kind=ToyModule)
        half = run(2, tmp_path / "half")
        assert half != pytest.approx(whole, rel=1e-2)
        resumed = run(3, tmp_path / "rest", ckpt_path=str(tmp_path / "half" / "last.ckpt"), weights_only=True)
        assert resumed == pytest.approx(whole, rel=1e-4)

    def test_a_module_can_be_copied_while_it_is_watched(self, tmp_path):
        callback = BayesianMoECallback(("map", "laplace_evidence"))

        class Copied(BuiltLate):
            def configure_model(self):
                super().configure_model()
                assert self._load_state_dict_pre_hooks
                memo = {}
                copy.deepcopy(self, memo).load_state_dict(self.state_dict())
                assert not {id(callback), id(self.trainer)} & set(memo)

            def on_train_start(self):
                assert not self._load_state_dict_pre_hooks

        trainer(tmp_path, [callback], max_epochs=1).fit(Copied(), train_loader(), calibration_loader())
        assert callback.fitted is not None

    def test_a_prior_mean_that_was_overwritten_unseen_is_refused(self, tmp_path):
        class Unseen(BuiltLate):
            def load_state_dict(self, state_dict, strict=True, assign=False):
                with torch.no_grad():
                    for name, parameter in self.named_parameters():
                        parameter.copy_(state_dict[name])

        first = trainer(tmp_path, [], max_epochs=1)
        first.fit(ToyModule(), train_loader())
        first.save_checkpoint(tmp_path / "a.ckpt")

        def resume(module, **options):
            t = trainer(tmp_path, [BayesianMoECallback(("map", LaplaceEvidence(**options)))], max_epochs=2)
            t.fit(module, train_loader(), calibration_loader(), ckpt_path=str(tmp_path / "a.ckpt"), weights_only=True)
            return t

        with pytest.raises(ValueError, match="has overwritten the weights from before"):
            resume(Unseen())
        used = resume(Unseen(), prior_mean="zero")
        # What that trainer resumed says nothing of what it trains next.
        used.fit_loop.max_epochs = 3
        used.fit(Unseen(), train_loader(), calibration_loader())

    def test_a_training_without_steps_says_that_nothing_was_fitted(self, tmp_path):
        with pytest.warns(UserWarning, match="training ended without a fit.*fit_posterior"):
            trainer(tmp_path, [BayesianMoECallback()], limit_train_batches=0).fit(
                ToyModule(), train_loader(), calibration_loader()
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
        with pytest.raises(WeightMismatchError, match="other weights"):
            trainer(tmp_path, [BayesianMoECallback(**options)]).test(ToyModule(seed=5), test_loader(), verbose=False)

    def test_a_fit_with_other_settings_is_refused(self, trained):
        callback = BayesianMoECallback(("map", LaplaceLPO(scope="global")), dirpath=str(trained.folder / "bayesian"))
        with pytest.raises(NotFittedError, match=r"other options: scope='layer' \(here 'global'\).*fit_posterior"):
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
        fit_posterior(callback, trainer(tmp_path, [callback]), trained.module)
        again = BayesianMoECallback(dirpath=str(tmp_path / "b"))
        metrics = trainer(tmp_path, [again]).test(trained.module, test_loader(), verbose=False)[0]
        assert "laplace_lpo/test/nll" in metrics

    def test_entropy_belongs_to_the_probabilities_under_any_link(self, trained):
        callback = BayesianMoECallback(
            ("map", LaplaceLPO(link="probit")),
            predict_method="laplace_lpo",
            dirpath=str(trained.folder / "bayesian"),
        )
        first = trainer(trained.folder, [callback]).predict(trained.module, test_loader())[0]
        torch.testing.assert_close(first["entropy"], -(first["probs"] * first["log_probs"]).sum(1))


@pytest.mark.skipif(not hasattr(lightning.pytorch.callbacks, "WeightAveraging"), reason="since Lightning 2.6")
class TestWeightAveraging:
    """It swaps averaged weights in for validation, and saves those."""

    def fit(self, folder, methods=("map", "temperature", "checkpoint_ensemble"), **options):
        averaging = lightning.pytorch.callbacks.WeightAveraging(avg_fn=get_ema_avg_fn(0.8))
        callback = BayesianMoECallback(methods, dirpath=str(folder / "fit"), **options)
        saves = ModelCheckpoint(folder / "saved", monitor="val_loss", mode="max")  # the first epoch's
        run = trainer(folder, [averaging, callback, saves], max_epochs=3, enable_checkpointing=True)
        module = ToyModule()
        run.fit(module, loader(48, 1), loader(48, 2))
        best = ToyModule()
        best.load_state_dict(torch.load(saves.best_model_path, weights_only=True)["state_dict"])
        return run, callback, module, best

    def test_the_best_weights_are_averaged_ones(self, tmp_path):
        run, callback, module, best = self.fit(tmp_path, fit_at="best")
        assert callback.fitted.has_weights_of(best)
        assert not callback.fitted.has_weights_of(module)
        fresh = BayesianMoECallback(callback.methods, dirpath=str(tmp_path / "fit"))
        assert "checkpoint_ensemble/test/nll" in trainer(tmp_path, [fresh]).test(best, test_loader(), verbose=False)[0]
        # The same trainer would validate with its last average in their place.
        with pytest.raises(WeightMismatchError):
            run.validate(best, test_loader(), verbose=False)

    def test_the_last_weights_are_averaged_ones(self, tmp_path):
        run, callback, module, best = self.fit(tmp_path)
        assert callback.fitted.has_weights_of(module)
        assert not callback.fitted.has_weights_of(best)
        found = run.validate(module, test_loader(), verbose=False)[0]
        tested = run.test(module, test_loader(), verbose=False)[0]
        for method in ("map", "temperature", "checkpoint_ensemble"):
            assert found[f"{method}/val/nll"] == pytest.approx(tested[f"{method}/test/nll"])

    def test_weights_that_change_before_the_members_are_evaluated(self, tmp_path):
        _, _, module, _ = self.fit(tmp_path)

        class Shifts(L.Callback):
            def on_validation_epoch_end(self, trainer, pl_module):
                with torch.no_grad():
                    next(pl_module.parameters()).add_(1)

        for methods, is_refused in (("map", "temperature"), False), (("map", "checkpoint_ensemble"), True):
            again = BayesianMoECallback(methods, dirpath=str(tmp_path / "fit"))
            copied = copy.deepcopy(module)
            run = trainer(tmp_path, [Shifts(), again])
            with (
                pytest.raises(WeightMismatchError, match="members of checkpoint_ensemble")
                if is_refused
                else nullcontext()
            ):
                run.validate(copied, test_loader(), verbose=False)


class WithHead(ToyModule):
    """A head is trained beside a transformers model that is not; an average of the head follows."""

    def __init__(self, seed=0):
        super().__init__()
        self.network = self.network.model.requires_grad_(False)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.head = torch.nn.Linear(16, 3)
        self.average = copy.deepcopy(self.head)

    def class_logits(self, batch):
        states = self.network(input_ids=batch["input_ids"], use_cache=False).last_hidden_state
        return self.head(states[:, -1]), batch["labels"]

    def on_fit_end(self):
        self.average.load_state_dict(self.head.state_dict())

    def configure_optimizers(self):
        return torch.optim.SGD(self.head.parameters(), lr=0.05)


class TestHeadBesideTheModel:
    METHODS = ("map", "temperature", "laplace_lpo")

    def callback(self, **options):
        return BayesianMoECallback(self.METHODS, **options)

    def train(self, folder, module, *callbacks):
        run = trainer(folder, list(callbacks), max_epochs=1)
        run.fit(module, loader(32, 1), loader(32, 2))
        return module

    @pytest.mark.parametrize("methods", [METHODS, ("map", "temperature")])
    def test_that_of_another_run_is_refused(self, tmp_path, methods):
        first = BayesianMoECallback(methods)
        fitted = self.train(tmp_path, WithHead(seed=1), first)
        other = self.train(tmp_path, WithHead(seed=2))
        with pytest.raises(WeightMismatchError, match=r"2 parameters differ, .*: head\.bias, head\.weight"):
            trainer(tmp_path, [BayesianMoECallback(methods)]).test(other, test_loader(), verbose=False)
        with pytest.raises(WeightMismatchError):
            trainer(tmp_path, [first]).test(other, test_loader(), verbose=False)
        found = trainer(tmp_path, [BayesianMoECallback(methods)]).test(fitted, test_loader(), verbose=False)[0]
        assert "temperature/test/nll" in found
        # In a folder of its own once it is fitted.
        second = BayesianMoECallback(methods)
        second.fit_posterior(
            other, trainer=trainer(tmp_path, [second]), train_dataloaders=loader(32, 1), val_dataloaders=loader(32, 2)
        )
        assert second.fitted.fit_id != first.fitted.fit_id
        assert {path.parent.name for path in tmp_path.rglob("index.json")} == {"bayesian_moe", "bayesian_moe-v1"}

    def test_a_method_that_is_added_later(self, tmp_path):
        module = self.train(tmp_path, WithHead(), BayesianMoECallback(("map", "temperature")))
        more = self.callback()
        more.fit_posterior(
            module, trainer=trainer(tmp_path, [more]), train_dataloaders=loader(32, 1), val_dataloaders=loader(32, 2)
        )
        with torch.no_grad():
            module.average.weight.add_(1)
        assert more.fitted.has_weights_of(module)
        with torch.no_grad():
            module.head.bias.add_(1)
        assert not more.fitted.has_weights_of(module)
        assert not load_fit(tmp_path / "bayesian_moe")[0].has_weights_of(module)


class SaveWeights(L.Callback):
    def __init__(self, path):
        self.path = path

    def on_train_end(self, trainer, pl_module):
        torch.save(pl_module.state_dict(), self.path)


class Mortal(ToyModule):
    """Is killed in a forward pass after training; counts those it survived, after the checks of first batches."""

    def __init__(self, lives=None):
        super().__init__()
        self.lives = lives
        self.passes = -3

    def class_logits(self, batch):
        if not self.training:
            if self.passes == self.lives:
                raise RuntimeError("killed")
            self.passes += 1
        return super().class_logits(batch)

    def validation_step(self, batch, batch_idx):
        return None


CHECKPOINTED = {"methods": LAPLACE, "curvature_checkpoint_every": 4, "curvature": Curvature(fisher="mc")}


def accumulators(folder):
    return [path.name for path in folder.glob("curvature_state*")]


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
        fit_posterior(callback, trainer(folder, [callback]), module, data, prior_mean=prior_mean)
        return module.passes

    @pytest.mark.parametrize(("lives", "kept"), [(2, 0), (9, 8), (10, 10), (12, 10)])
    def test_fit_posterior_goes_on_to_the_same_bits(self, tmp_path, lives, kept):
        whole = tmp_path / "whole"
        whole.mkdir()
        self.run(whole, Mortal(), curvature_checkpoint_every=None)
        folder = self.killed(tmp_path / "killed", lives)
        assert len(accumulators(folder)) == bool(kept)
        assert self.go_on(tmp_path / "killed", train_loader()) == 10 + 7 - kept
        (expected, _), (found, _) = load_fit(whole / "bayesian"), load_fit(folder)
        assert found.fingerprint == expected.fingerprint
        for name in LAPLACE[1:]:
            precisions = [fit.methods[name].state["prior_precision"] for fit in (found, expected)]
            assert torch.equal(*precisions)
        for one, other in zip(found.posteriors.values(), expected.posteriors.values(), strict=True):
            for layer, same in zip(one.factors.layers, other.factors.layers, strict=True):
                assert all(torch.equal(value, same.tensors()[name]) for name, value in layer.tensors().items())
        assert accumulators(folder) == []

    @pytest.mark.parametrize("has_generator", [False, True])
    def test_a_loader_with_a_generator_of_its_own(self, tmp_path, has_generator):
        generator = torch.Generator().manual_seed(3) if has_generator else None
        data = DataLoader(ToyData(160, 1), batch_size=16, shuffle=True, generator=generator)
        self.killed(tmp_path, 9, data)
        assert self.go_on(tmp_path, data) == 9

    def test_another_order_is_refused(self, tmp_path):
        folder = self.killed(tmp_path, 9)
        with pytest.raises(ValueError, match=r"curvature_state"):
            self.go_on(tmp_path, loader(160, 1))
        assert len(accumulators(folder)) == 1

    def test_a_fast_dev_run_leaves_them_alone(self, tmp_path):
        folder = self.killed(tmp_path, 9)
        (name,) = accumulators(folder)
        before = (folder / name).read_bytes()
        callback = BayesianMoECallback(**{**CHECKPOINTED, "curvature_checkpoint_every": 1}, dirpath=str(folder))
        trainer(tmp_path, [callback], fast_dev_run=True).fit(ToyModule(), train_loader(), calibration_loader())
        assert sorted(p.name for p in folder.iterdir()) == [".training", name]
        assert (folder / name).read_bytes() == before
