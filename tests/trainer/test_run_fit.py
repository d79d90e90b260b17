"""What a fit within a trainer leaves when a part of it fails."""

from __future__ import annotations

import pytest
from toy import ToyModule, calibration_loader, train_loader, trainer

from bmoe_lightning import BayesianMoECallback
from bmoe_lightning.methods import CheckpointEnsemble
from bmoe_lightning.methods.needs import NeedsError
from bmoe_lightning.methods.storage import load_fit


def test_a_fit_that_cannot_be_written_is_not_lost(tmp_path, monkeypatch):
    """A second try writes it, without a pass over the data."""

    def full(*_):
        raise OSError(28, "No space left on device")

    callback, module = BayesianMoECallback(("map", "temperature"), dirpath=str(tmp_path / "fit")), ToyModule()
    run = trainer(tmp_path, [callback], max_epochs=1)
    with monkeypatch.context() as patched:
        patched.setattr("bmoe_lightning.trainer.run_folder.save_fit", full)
        with pytest.raises(OSError, match="No space left"):
            run.fit(module, train_loader(), calibration_loader())
    fitted = callback.fitted
    assert fitted.has_weights_of(module)
    callback.fit_posterior(module, trainer=run, train_dataloaders=train_loader(), val_dataloaders=calibration_loader())
    assert callback.fitted.methods["temperature"] is fitted.methods["temperature"]
    assert load_fit(tmp_path / "fit")[0].fit_id == fitted.fit_id


def test_a_fit_without_training_needs_snapshots_for_methods_that_use_them(tmp_path):
    callback = BayesianMoECallback(("map", "temperature", CheckpointEnsemble()), dirpath=str(tmp_path / "fit"))
    with pytest.raises(NeedsError, match="weights after at least 2 epochs, and there will be 0"):
        callback.fit_posterior(
            ToyModule(), trainer=trainer(tmp_path, [callback]), train_dataloaders=train_loader(),
            val_dataloaders=calibration_loader(),
        )  # fmt: skip
    assert callback.fitted is None
