"""The weights from before training, when a run resumes, and when the model is built late."""

from __future__ import annotations

import copy

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from toy import ToyModule, calibration_loader, fit_posterior, loader, toy_model, train_loader, trainer

from bmoe_lightning.callback import BayesianMoECallback
from bmoe_lightning.methods import LaplaceEvidence


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


class TestPriorMean:
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
