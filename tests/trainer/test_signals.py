"""SIGTERM and SIGINT in the passes that the callback runs after training."""

from __future__ import annotations

import logging
import os
import signal

import pytest
import torch
from fit_files import fitted_states
from toy import ToyModule, calibration_loader, loader, test_loader, trainer

from bmoe_lightning import BayesianMoECallback
from bmoe_lightning.trainer.signals import deferred_sigint


class Signalled(ToyModule):
    """Sends a signal to its process in a call of `class_logits` after training."""

    def __init__(self, number=signal.SIGTERM, at=None):
        super().__init__()
        self.number, self.at = number, at
        self.calls = 0

    def class_logits(self, batch):
        if not self.network.training:
            self.calls += 1
            if self.calls == self.at:
                os.kill(os.getpid(), self.number)
        return super().class_logits(batch)


def callback(folder, every=100):
    return BayesianMoECallback(
        methods=("map", "laplace_lpo"), dirpath=str(folder), curvature_checkpoint_every=every, seed=1
    )


def fit(folder, module, every=100):
    run = callback(folder, every)
    torch.manual_seed(0)
    trainer(folder, [run], max_epochs=1, num_sanity_val_steps=0).fit(module, loader(160, 1), calibration_loader())
    return run


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    module = Signalled()
    fit(folder, module)
    return fitted_states(folder), module.calls


FIRST = 3  # calls in the checks of the first batches of both loaders
# Calls in the validation at the end of the epoch, in the curvature pass, and in each of its first batches.
VALIDATION, CURVATURE, BATCH = 7, 14, 2
STATUS = {signal.SIGTERM: 143, signal.SIGINT: 1}  # Lightning itself exits with 1 after KeyboardInterrupt


class TestCurvature:
    @pytest.mark.parametrize("number", STATUS)
    def test_sums_are_written_and_resumed_to_the_same_bits(self, tmp_path, undisturbed, number, caplog):
        expected, calls = undisturbed
        module = Signalled(number, at=FIRST + VALIDATION + 1)
        with pytest.raises(SystemExit) as stop, caplog.at_level(logging.WARNING):
            fit(tmp_path, module)
        assert stop.value.code == STATUS[number]
        assert module.calls == FIRST + VALIDATION + BATCH
        assert list(tmp_path.glob("curvature_state-*"))
        (said,) = [r.getMessage() for r in caplog.records if r.name == "bmoe_lightning.trainer.signals"]
        assert f"stopped by {signal.Signals(number).name}" in said
        assert f"stored in {tmp_path}" in said

        module.at = None
        again = callback(tmp_path)
        run = trainer(tmp_path, [again], max_epochs=1)
        again.fit_posterior(module, trainer=run, train_dataloaders=loader(160, 1), val_dataloaders=calibration_loader())
        assert module.calls == calls + FIRST  # the first batches of both loaders are checked again
        found = fitted_states(tmp_path)
        assert found.keys() == expected.keys()
        assert all(torch.equal(value, found[key]) for key, value in expected.items())

    def test_in_calibration(self, tmp_path):
        module = Signalled(at=FIRST + VALIDATION + CURVATURE + 2)
        with pytest.raises(SystemExit) as stop:
            fit(tmp_path, module)
        assert stop.value.code == 143
        assert module.calls == FIRST + VALIDATION + CURVATURE + 2

    def test_without_checkpoints_it_stops_too(self, tmp_path, caplog):
        module = Signalled(at=FIRST + VALIDATION + 1)
        with pytest.raises(SystemExit) as stop:
            fit(tmp_path, module, every=None)
        assert stop.value.code == 143
        assert "curvature_checkpoint_every=N" in caplog.text
        assert not list(tmp_path.glob("curvature_state-*"))

    def test_a_signal_in_the_last_batch_of_a_pass_stops_before_the_next_pass(self, tmp_path):
        module = Signalled(at=FIRST + VALIDATION + CURVATURE)
        with pytest.raises(SystemExit):
            fit(tmp_path, module)
        assert module.calls == FIRST + VALIDATION + CURVATURE


def test_in_training_the_exit_status_is_that_of_the_signal(tmp_path):
    class Stopped(ToyModule):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().training_step(batch, batch_idx)

    with pytest.raises(SystemExit) as stop:
        fit(tmp_path, Stopped())
    assert stop.value.code == 143


def test_in_evaluation_and_the_handler_of_the_user_is_called(tmp_path):
    module = Signalled()
    run = fit(tmp_path, module)
    received = []
    before = signal.signal(signal.SIGTERM, lambda *_: received.append(0))
    try:
        module.calls, module.at = 0, 2
        with pytest.raises(SystemExit) as stop:
            trainer(tmp_path, [run]).test(module, test_loader(), verbose=False)
        after = signal.getsignal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stop.value.code == 143
    assert received == [0]
    after(signal.SIGTERM, None)
    assert received == [0, 0]


def test_in_predictions(tmp_path):
    """Lightning's loop of predictions goes on to its end."""
    module = Signalled()
    run = fit(tmp_path, module)
    predicts = BayesianMoECallback(run.methods, dirpath=str(tmp_path), predict_method="map")
    module.calls, module.at = 0, 2
    data = loader(48, 3, batch_size=4)
    with pytest.raises(SystemExit) as stop:
        trainer(tmp_path, [predicts]).predict(module, data)
    assert stop.value.code == 143
    assert module.calls < len(data)
    assert "predict_step" not in vars(module)


class TestSigint:
    def test_is_deferred_once(self):
        with deferred_sigint() as check:
            check()
            os.kill(os.getpid(), signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                check()
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def test_a_handler_of_the_user_stays(self):
        received = []
        before = signal.signal(signal.SIGINT, lambda *_: received.append(0))
        try:
            with deferred_sigint() as check:
                os.kill(os.getpid(), signal.SIGINT)
                check()
        finally:
            signal.signal(signal.SIGINT, before)
        assert received == [0]


def test_a_stopped_evaluation_says_that_the_fit_is_there(tmp_path, caplog):
    module = Signalled()
    run = fit(tmp_path, module)
    module.calls, module.at = 0, 2
    with pytest.raises(SystemExit), caplog.at_level(logging.WARNING):
        trainer(tmp_path, [run]).test(module, test_loader(), verbose=False)
    (said,) = [r.getMessage() for r in caplog.records if r.name == "bmoe_lightning.trainer.signals"]
    assert said == f"stopped by SIGTERM; the fit is as it was ({tmp_path}): run the evaluation again"
