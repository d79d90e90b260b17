"""Runs whose learning rate or batch size Lightning's tuners search, which save the run, try steps, and restore it."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, ModelCheckpoint
from run_folder_cases import Dies, Killed
from toy import ToyModule, loader, toy_model, trainer

from bmoe_lightning import BayesianMoECallback
from bmoe_lightning.methods import SWAG, CheckpointEnsemble, LaplaceEvidence, read_snapshot
from bmoe_lightning.methods.storage import load_fit
from bmoe_lightning.trainer.snapshot_files import epoch_of

METHODS = ("map", CheckpointEnsemble(num_snapshots=4), SWAG(num_snapshots=4))


class Tuned(ToyModule):
    """Makes its loaders of the batch size that a tuner sets."""

    batch_size = 16

    def train_dataloader(self):
        return loader(32, 1, batch_size=self.batch_size)

    def val_dataloader(self):
        return loader(64, 2)


class LateTuned(Tuned):
    """Has no model before `configure_model`."""

    def __init__(self):
        super().__init__()
        del self.network

    def configure_model(self):
        if not hasattr(self, "network"):
            self.network = toy_model()


def learning_rate_finder(kind=LearningRateFinder, **options):
    return kind(**{"num_training_steps": 3, "max_lr": 0.1, "update_attr": False, **options})


def batch_size_finder(kind=BatchSizeFinder):
    return kind(init_val=16, max_trials=1, steps_per_trial=2)


class LateLearningRateFinder(LearningRateFinder):
    """Searches when the trainer has restored the progress of the run."""

    def on_fit_start(self, trainer, pl_module):
        pass

    def on_train_start(self, trainer, pl_module):
        self.lr_find(trainer, pl_module)


class LateBatchSizeFinder(BatchSizeFinder):
    """Searches when the trainer has restored the progress of the run."""

    def on_fit_start(self, trainer, pl_module):
        pass

    def on_train_start(self, trainer, pl_module):
        self.scale_batch_size(trainer, pl_module)


class SavesAt(L.Callback):
    """Saves a checkpoint in a hook."""

    def __init__(self, hook, path):
        setattr(self, hook, lambda trainer, module: trainer.save_checkpoint(path))


def fit(root, epochs, *others, methods=METHODS, checkpoint=None, module=None, folder="fit", **options):
    """Train with other callbacks before this library's, and save a checkpoint after each epoch."""
    callback = BayesianMoECallback(methods, dirpath=str(root / folder), **options)
    saves = ModelCheckpoint(root / "saved", filename="{epoch}", save_top_k=-1)
    run = trainer(root, [*others, callback, saves], max_epochs=epochs, enable_checkpointing=True)
    L.seed_everything(0, verbose=False)
    run.fit(Tuned() if module is None else module, ckpt_path=checkpoint, weights_only=checkpoint and True)
    return callback


def after_epoch(root, epoch):
    return str(root / "saved" / f"epoch={epoch}.ckpt")


@pytest.fixture
def run(tmp_path):
    """A folder with a run of two epochs."""
    fit(tmp_path, 2)
    return tmp_path


def assert_same_fit(one, other):
    for name in ("checkpoint_ensemble", "swag"):
        states = [callback.fitted.methods[name].state for callback in (one, other)]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    snapshots = [load_fit(Path(callback.state_dict()["folder"]))[1] for callback in (one, other)]
    assert [epoch_of(path) for path in snapshots[0]] == [epoch_of(path) for path in snapshots[1]]
    for path, same in zip(*snapshots, strict=True):
        weights = read_snapshot(path), read_snapshot(same)
        assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.parametrize(
    "finder", [lambda: learning_rate_finder(LateLearningRateFinder), lambda: batch_size_finder(LateBatchSizeFinder)]
)
def test_a_resumed_run_has_the_same_members_as_without(run, finder):
    plain = fit(run, 4, checkpoint=after_epoch(run, 1), folder="plain")
    tuned = fit(run, 4, finder(), checkpoint=after_epoch(run, 1), folder="tuned")
    assert tuned.fitted.methods["checkpoint_ensemble"].state["members"] == 4
    assert_same_fit(tuned, plain)


@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("finder", [learning_rate_finder, batch_size_finder])
def test_a_resumed_run_whose_progress_lightning_has_lost(run, finder, epochs):
    """It restores its loops from the tuner's checkpoint, so that trained weights are trained from epoch 0."""
    _, before = load_fit(run / "fit")
    weights = [read_snapshot(path) for path in before]
    tuned = fit(run, epochs, finder(), checkpoint=after_epoch(run, 1), folder="tuned", methods=("map", METHODS[1]))
    found = load_fit(run / "tuned")[1]
    assert [epoch_of(path) for path in found] == list(range(2 + epochs))[-4:]
    assert tuned.fitted.methods["checkpoint_ensemble"].state["members"] == len(found)
    kept = [read_snapshot(path) for path in found[:-epochs]]
    for one, other in zip(kept, weights[-len(kept) :], strict=True):
        assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_in_a_folder_that_was_moved(run):
    """The checkpoint that the user gave says where the run's folder is, not the tuner's."""
    (run / "moved").mkdir()
    for name in ("fit", "saved"):
        (run / name).rename(run / "moved" / name)
    finder = learning_rate_finder(LateLearningRateFinder)
    tuned = fit(run, 4, finder, checkpoint=after_epoch(run / "moved", 1), folder="tuned")
    assert tuned.fitted.methods["checkpoint_ensemble"].state["members"] == 4


@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start"])
def test_a_checkpoint_from_before_the_first_epoch_names_the_snapshots(run, hook):
    with pytest.raises(Killed):
        fit(run, 4, SavesAt(hook, run / "early.ckpt"), Dies("on_train_epoch_start"), checkpoint=after_epoch(run, 1))
    names = [path.name for path in load_fit(run / "fit")[1]]
    states = torch.load(run / "early.ckpt", weights_only=True)["callbacks"]
    (state,) = [state for key, state in states.items() if key.startswith("BayesianMoECallback")]
    assert state["snapshots"] == names
    if hook == "on_train_start":  # before, Lightning has not restored its loops
        plain = fit(run, 4, checkpoint=after_epoch(run, 1), folder="plain")
        assert_same_fit(fit(run, 4, checkpoint=str(run / "early.ckpt"), folder="again"), plain)


@pytest.mark.parametrize("finder", [learning_rate_finder, batch_size_finder])
def test_a_new_run_of_a_used_callback_takes_nothing_over(tmp_path, finder):
    callback = BayesianMoECallback(("map", METHODS[1]), dirpath=str(tmp_path / "fit"))
    trainer(tmp_path, [callback], max_epochs=2).fit(Tuned())
    first = callback.fitted.fit_id
    trainer(tmp_path, [finder(), callback], max_epochs=2).fit(Tuned())
    assert callback.fitted.fit_id != first
    assert callback.fitted.methods["checkpoint_ensemble"].state["members"] == 2


@pytest.mark.parametrize("finder", [learning_rate_finder, batch_size_finder])
def test_nothing_is_fitted_to_the_weights_of_a_trial(tmp_path, finder):
    """A run that was killed before its fit is completed after a resumption, and a trial ends like one."""
    with pytest.raises(Killed):
        fit(tmp_path, 2, Dies("on_train_end"))
    is_trial = []

    def class_logits(module, batch):
        is_trial.append(callback not in module.trainer.callbacks)
        return module.class_logits(batch)

    callback = BayesianMoECallback(METHODS, dirpath=str(tmp_path / "fit"), class_logits=class_logits)
    run = trainer(tmp_path, [finder(), callback], max_epochs=2)
    run.fit(Tuned(), ckpt_path=after_epoch(tmp_path, 1), weights_only=True)
    assert callback.fitted is not None
    assert is_trial
    assert not any(is_trial)


@pytest.mark.parametrize("finder", [learning_rate_finder, batch_size_finder])
def test_a_fit_without_training_is_that_of_all_data(tmp_path, finder):
    methods = ("map", "temperature")
    plain, tuned = (BayesianMoECallback(methods, dirpath=str(tmp_path / name)) for name in "ab")
    plain.fit_posterior(Tuned(), trainer=trainer(tmp_path, [plain]))
    run = trainer(tmp_path, [finder(), tuned])
    before = list(run.callbacks)
    tuned.fit_posterior(Tuned(), trainer=run)
    assert len(tuned.fitted.calibration[0]) == len(plain.fitted.calibration[0]) == 64
    assert run.callbacks == before


def test_the_prior_mean_is_from_before_the_trial(tmp_path):
    def norm(*others):
        methods = ("map", LaplaceEvidence())
        found = fit(tmp_path, 1, *others, methods=methods, module=LateTuned(), folder=str(len(others)))
        return found.fitted.methods["laplace_evidence"].state["prior_precision"]

    torch.testing.assert_close(norm(learning_rate_finder(max_lr=1.0)), norm(), rtol=0, atol=0)
