"""Which weights methods are fitted to, and which are refused: the best, averaged ones, those of a head."""

from __future__ import annotations

import copy
import types
from contextlib import nullcontext

import lightning as L
import lightning.pytorch.callbacks
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning, ModelCheckpoint
from torch.optim.swa_utils import get_ema_avg_fn
from toy import (
    ToyModule,
    calibration_loader,
    loader,
    test_loader,
    train_loader,
    trainer,
)

from bmoe_lightning.callback import BayesianMoECallback
from bmoe_lightning.curvature import Curvature
from bmoe_lightning.laplace import WeightMismatchError
from bmoe_lightning.methods import LeaveOneOutTemperature
from bmoe_lightning.methods.storage import load_fit
from bmoe_lightning.utils.checkpoint_io import UnsafeCheckpointError


class TestWeights:
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
        with pytest.raises(UnsafeCheckpointError, match=r"objects of types.SimpleNamespace, and unpickling"):
            run.fit(module, train_loader(), calibration_loader())
        assert module.epochs == (0 if kept == "hyperparameters" else 1)

    def test_other_weights_are_refused_for_temperatures_too(self, tmp_path):
        options = {"methods": ("map", "temperature"), "dirpath": str(tmp_path / "b")}
        trainer(tmp_path, [BayesianMoECallback(**options)], max_epochs=1).fit(
            ToyModule(), train_loader(), calibration_loader()
        )
        with pytest.raises(WeightMismatchError, match="other weights"):
            trainer(tmp_path, [BayesianMoECallback(**options)]).test(ToyModule(seed=5), test_loader(), verbose=False)


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


class Unfreezes(BaseFinetuning):
    """Trains the head, and from the second epoch on the experts too."""

    def __init__(self):
        super().__init__()
        self.moved = 0.0

    def experts(self, module):
        return [layer.mlp.experts for layer in module.network.model.layers]

    def freeze_before_training(self, module):
        self.freeze(module.network.model)
        self.before = module.network.model.layers[0].mlp.experts.down_proj.detach().clone()

    def finetune_function(self, module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(self.experts(module), optimizer)

    def on_train_end(self, run, module):
        weight = module.network.model.layers[0].mlp.experts.down_proj.detach()
        self.moved = float((weight - self.before).abs().max())


class OfUnfrozen(ToyModule):
    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def test_weights_that_are_unfrozen_during_training_count_as_trained(tmp_path):
    unfreezes, module = Unfreezes(), OfUnfrozen()
    method = LeaveOneOutTemperature(curvature=Curvature(rank=3))
    callback = BayesianMoECallback([method], dirpath=str(tmp_path / "fit"))
    trainer(tmp_path, [unfreezes, callback], max_epochs=2).fit(module, train_loader(), calibration_loader())
    assert unfreezes.moved > 0
    experts = {id(p) for part in unfreezes.experts(module) for p in part.parameters()}
    trained = [p for n, p in module.named_parameters() if id(p) in experts or "lm_head" in n]
    (share,) = callback.fitted.shares.values()
    assert share.num_trained == sum(p.numel() for p in trained)
    assert 0 < share.share < 1
    assert float(callback.fitted.state_of(method)["kappa"]) == pytest.approx(share.kappa)
