"""A training that was stopped after its last step is resumed by the same command, which then fits its methods."""

from __future__ import annotations

import os
import signal
import warnings

import lightning as L
import pytest
import torch
from fit_files import fitted_states
from lightning.pytorch.callbacks import ModelCheckpoint
from toy import ToyModule, calibration_loader, loader, test_loader, trainer

from bmoe_lightning import BayesianMoECallback
from bmoe_lightning.methods.needs import NeedsError
from bmoe_lightning.trainer.run_folder import RunFolder

METHODS = ("map", "temperature", "laplace_evidence", "checkpoint_ensemble")


class Stopped(ToyModule):
    """Sends a signal to its process in the third batch after training."""

    def __init__(self, number=signal.SIGTERM):
        super().__init__()
        self.number = number
        self.calls = None

    def on_train_epoch_end(self):
        if self.current_epoch == 1:
            self.calls = 0

    def class_logits(self, batch):
        if self.calls is not None:
            self.calls += 1
            if self.calls == 3:
                os.kill(os.getpid(), self.number)
        return super().class_logits(batch)


class Moved(L.Callback):
    """Gives the model other weights before the methods are fitted, as an average of weights does."""

    def on_train_end(self, trainer, pl_module):
        with torch.no_grad():
            for parameter in pl_module.parameters():
                parameter.mul_(0.9)


class Job:
    """A user's script: one command that resumes from the last checkpoint, if there is one.

    Args:
        root: Folder of checkpoints and fits.
        dirpath: Whether the callback is given its folder.
    """

    def __init__(self, root, *, dirpath=True):
        self.root = root
        self.given = str(root / "fit") if dirpath else None

    def __call__(self, module=None, *, every=1, methods=METHODS, others=(), **options):
        L.seed_everything(0)
        module = module or ToyModule()
        callback = BayesianMoECallback(methods, dirpath=self.given, curvature_checkpoint_every=every)
        saves = ModelCheckpoint(self.root, save_last=True, enable_version_counter=False)
        run = trainer(self.root, [*others, callback, saves], max_epochs=2, enable_checkpointing=True, **options)
        last = self.root / "last.ckpt"
        steps = {"ckpt_path": str(last), "weights_only": True} if last.exists() else {}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run.fit(module, loader(160, 1), calibration_loader(), **steps)
        assert "run" not in vars(run.fit_loop)
        self.warned = [str(warning.message) for warning in caught]
        self.run, self.callback, self.module = run, callback, module
        return run.test(module, test_loader(), verbose=False)[0] if callback.fitted is not None else None


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    job = Job(tmp_path_factory.mktemp("whole"))
    return job(), fitted_states(job.root / "fit")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("every", [1, None])
@pytest.mark.parametrize("dirpath", [True, False])
def test_the_same_command_ends_with_the_same_fit(tmp_path, whole, number, every, dirpath):
    job = Job(tmp_path, dirpath=dirpath)
    with pytest.raises(SystemExit):
        job(Stopped(number), every=every)
    fit_folder = tmp_path / ("fit" if dirpath else "bayesian_moe")
    assert bool(list(fit_folder.glob("curvature_state-*"))) == bool(every)
    metrics = job(every=every)
    assert metrics == whole[0]
    assert job.run.global_step == 20
    found = fitted_states(fit_folder)
    assert found.keys() == whole[1].keys()
    assert all(torch.equal(value, found[name]) for name, value in whole[1].items())
    assert not list(fit_folder.glob("curvature_state-*"))


def test_a_finished_training_is_left_as_it_is(tmp_path, whole):
    job = Job(tmp_path)
    first = job()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "fit").rglob("*")}
    assert first == whole[0]
    job()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "fit").rglob("*")} == before
    assert job.run.test(job.module, test_loader(), verbose=False)[0] == first


def test_the_sums_of_a_process_that_was_killed_after_its_fit_are_removed(tmp_path, whole, monkeypatch):
    job, save = Job(tmp_path), RunFolder.save

    def killed(self, *args):
        save(self, *args)
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save", killed)
        with pytest.raises(RuntimeError, match="killed"):
            job()
    assert list((tmp_path / "fit").glob("curvature_state-*"))
    assert job() == whole[0]
    assert not list((tmp_path / "fit").glob("curvature_state-*"))


def test_a_callback_that_training_did_not_have_is_fitted(tmp_path):
    saves = ModelCheckpoint(tmp_path, save_last=True, enable_version_counter=False)
    L.seed_everything(0)
    trainer(tmp_path, [saves], max_epochs=2, enable_checkpointing=True).fit(ToyModule(), loader(160, 1))
    job = Job(tmp_path)
    assert "temperature/test/nll" in job(methods=("map", "temperature"))


def test_a_module_with_other_weights_from_before_training_is_refused(tmp_path):
    job = Job(tmp_path)
    with pytest.raises(SystemExit):
        job(Stopped())
    with pytest.raises(NeedsError, match="laplace_evidence measure how far"):
        job(ToyModule(seed=8))
    assert "map/test/nll" in job()


def test_weights_that_the_checkpoint_does_not_have_are_not_replaced_by_its_own(tmp_path):
    """A callback averages weights when training ends, which a resumed training that takes no step does not."""
    job = Job(tmp_path)
    with pytest.raises(SystemExit):
        job(Stopped(), others=[Moved()])
    assert job(others=[Moved()]) is None
    assert any("training ended without a fit" in sentence for sentence in job.warned)
    with pytest.raises(
        RuntimeError, match=r"curvature pass that was stopped are stored in .*fit: call fit_posterior\("
    ):
        job.run.test(job.module, test_loader(), verbose=False)


def test_two_callbacks_of_one_trainer(tmp_path):
    saves = ModelCheckpoint(tmp_path, save_last=True, enable_version_counter=False)
    L.seed_everything(0)
    trainer(tmp_path, [saves], max_epochs=2, enable_checkpointing=True).fit(ToyModule(), loader(160, 1))
    callbacks = [BayesianMoECallback(["map"], name=name, dirpath=str(tmp_path / "fit")) for name in "ab"]
    run = trainer(tmp_path, callbacks, max_epochs=2)
    run.fit(ToyModule(), loader(160, 1), ckpt_path=str(tmp_path / "last.ckpt"), weights_only=True)
    assert all(callback.fitted is not None for callback in callbacks)
    assert "run" not in vars(run.fit_loop)


def test_what_a_process_left_that_was_killed_while_it_wrote_is_removed(tmp_path, whole):
    left = [tmp_path / "fit" / "snapshots" / "a.safetensors", tmp_path / "fit" / "training"]
    left = [path.with_name(f".{path.name}.elsewhere-1-{'0' * 32}.tmp") for path in left]
    for path in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    other = tmp_path / "fit" / ".of_mine.tmp"
    other.touch()
    assert Job(tmp_path)() == whole[0]
    assert not any(path.exists() for path in left)
    assert other.exists()
