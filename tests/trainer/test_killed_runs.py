"""Whose snapshots a model gets: of the training that led to its weights, and of no other one in the same folder."""

from __future__ import annotations

import fcntl
import os
import shutil
import types
from contextlib import suppress
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from fake_trainer import FakeTrainer
from lightning.pytorch.callbacks import ModelCheckpoint
from toy import ToyModule, loader, test_loader, trainer

from bmoe_lightning import BayesianMoECallback
from bmoe_lightning.laplace.posterior import WeightMismatchError
from bmoe_lightning.methods import CheckpointEnsemble, save_snapshot
from bmoe_lightning.methods.snapshots import snapshot_info
from bmoe_lightning.methods.storage import load_fit
from bmoe_lightning.trainer.folders import claim, mark_weights, training_id
from bmoe_lightning.trainer.killed_runs import killed_run, run_of_weights
from bmoe_lightning.trainer.run_folder import RunFolder
from bmoe_lightning.trainer.snapshot_files import epoch_of, new_snapshot
from bmoe_lightning.utils.folder_lock import FolderLock

METHODS = ("map", CheckpointEnsemble(num_snapshots=3))
REFUSED = r"has snapshots of another training.*Pass ckpt_path="


class Killed(Exception):
    pass


class Does(L.Callback):
    """Does something in one hook: `Does("on_train_end", action)`."""

    def __init__(self, hook, action):
        setattr(self, hook, lambda trainer, module, *_: action(module))


def die(*_):
    raise Killed


def interrupt(*_):
    raise KeyboardInterrupt


def killed(root, seed, *before, epochs=3, dies=True, error=Killed, methods=METHODS, **options):
    """Train, and die when training has ended; the callback and the trained module."""
    callback, module = BayesianMoECallback(methods, **options), ToyModule(seed=seed)
    saves = ModelCheckpoint(root / f"saved-{seed}", filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    death = [Does("on_train_end", die)] if dies else []
    run = trainer(root, [*before, *death, callback, saves], max_epochs=epochs, enable_checkpointing=True)
    L.seed_everything(0, verbose=False)
    with suppress(error, SystemExit):
        run.fit(module, loader(32, 1), loader(32, 2))
    return callback, module


def completed(root, module, callback=None, checkpoint=None, methods=METHODS, **options):
    callback = callback or BayesianMoECallback(methods, **options)
    callback.fit_posterior(
        module, trainer=trainer(root, [callback]), train_dataloaders=loader(32, 1), val_dataloaders=loader(32, 2),
        ckpt_path=checkpoint,
    )  # fmt: skip
    return callback


def loaded(root, seed, epoch):
    """A module with the weights after an epoch, which do not say what run they are of."""
    checkpoint = torch.load(root / f"saved-{seed}" / f"epoch={epoch}.ckpt", weights_only=True)
    module = ToyModule(seed=9)
    module.load_state_dict(checkpoint["state_dict"])
    return module


def snapshots_of(callback):
    return load_fit(Path(callback.state_dict()["folder"]))[1]


def files(root):
    return {path: path.read_bytes() for path in (root / "snapshots").iterdir()}


def members(root, callback, module):
    run = trainer(root, [callback])
    run.test(module, test_loader(), verbose=False)
    return callback.predictions["test"]["checkpoint_ensemble"].log_probs


class TestInAGivenFolder:
    def test_those_of_another_training_are_refused(self, tmp_path):
        folder = str(tmp_path / "given")
        killed(tmp_path, 0, dirpath=folder)
        _, other = killed(tmp_path, 1)
        before = files(tmp_path / "given")
        with pytest.raises(WeightMismatchError, match=f"given {REFUSED}"):
            completed(tmp_path, other, dirpath=folder)
        assert files(tmp_path / "given") == before
        assert not (tmp_path / "given" / "index.json").exists()

    def test_they_do_not_matter_to_methods_without_snapshots(self, tmp_path):
        folder = str(tmp_path / "given")
        first, _ = killed(tmp_path, 0, dirpath=folder)
        before = files(tmp_path / "given")
        second = completed(tmp_path, ToyModule(seed=1), methods=("map", "temperature"), dirpath=folder)
        assert second.fitted.fit_id != first.state_dict()["fit"]
        assert snapshots_of(second) == []
        assert files(tmp_path / "given") == before

    def test_its_own_are_used_whatever_file_the_weights_are_from(self, tmp_path):
        whole, module = killed(tmp_path / "whole", 0, dies=False, dirpath=str(tmp_path / "whole" / "given"))
        killed(tmp_path, 0, dirpath=str(tmp_path / "given"))
        own = completed(tmp_path, loaded(tmp_path, 0, 2), dirpath=str(tmp_path / "given"))
        assert [epoch_of(path) for path in snapshots_of(own)] == [0, 1, 2]
        expected = members(tmp_path, whole, module)
        assert torch.equal(members(tmp_path, own, loaded(tmp_path, 0, 2)), expected)

    def test_those_of_later_epochs_are_left_out(self, tmp_path):
        killed(tmp_path, 0, dirpath=str(tmp_path / "given"))
        own = completed(tmp_path, loaded(tmp_path, 0, 1), dirpath=str(tmp_path / "given"))
        assert [epoch_of(path) for path in snapshots_of(own)] == [0, 1]

    def test_weights_that_change_when_training_ends(self, tmp_path):
        """As weight averaging changes them: no snapshot has them."""

        def average(module):
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.mul_(0.9)

        def class_logits(module, batch):
            return die() if module.global_step == 6 else module.class_logits(batch)

        options = {"methods": (*METHODS, "temperature"), "dirpath": str(tmp_path / "given")}
        _, module = killed(
            tmp_path, 0, Does("on_train_end", average), dies=False, class_logits=class_logits, **options
        )  # fmt: skip
        for mark in ("training", "completion"):  # the mark outlives a completion that is killed, too
            assert training_id(tmp_path / "given"), mark
            again = ToyModule(seed=9)
            again.load_state_dict(module.state_dict())
            if mark == "training":
                with pytest.raises(Killed):
                    completed(tmp_path, again, class_logits=die, **options)
        own = completed(tmp_path, again, **options)
        assert [epoch_of(path) for path in snapshots_of(own)] == [0, 1, 2]

    def test_a_fit_to_other_weights_is_replaced_by_the_run_that_was_about_to(self, tmp_path):
        folder = str(tmp_path / "given")
        first, _ = killed(tmp_path, 0, dies=False, dirpath=folder)
        _, module = killed(tmp_path, 1, dirpath=folder)
        with pytest.raises(WeightMismatchError, match="a fit to other weights than the model's"):
            completed(tmp_path, ToyModule(seed=2), dirpath=folder)
        own = completed(tmp_path, module, dirpath=folder)
        assert load_fit(tmp_path / "given")[0].fit_id == own.fitted.fit_id != first.fitted.fit_id
        assert [epoch_of(path) for path in snapshots_of(own)] == [0, 1, 2]


def test_each_default_folder_is_completed_by_its_own_run(tmp_path):
    first, one = killed(tmp_path, 0)
    second, _ = killed(tmp_path, 1)
    folders = [Path(callback.state_dict()["folder"]) for callback in (first, second)]
    assert [folder.name for folder in folders] == ["bayesian_moe", "bayesian_moe-v1"]
    with pytest.raises(WeightMismatchError, match=REFUSED):
        completed(tmp_path, ToyModule(seed=2))
    own = completed(tmp_path, one)
    assert own.state_dict()["folder"] == str(folders[0])
    assert own.fitted.fit_id == first.state_dict()["fit"]
    assert [epoch_of(path) for path in snapshots_of(own)] == [0, 1, 2]
    other = completed(tmp_path, ToyModule(seed=2), methods=("map", "temperature"))
    assert Path(other.state_dict()["folder"]).name == "bayesian_moe-v2"
    assert training_id(folders[1]) == second.state_dict()["fit"]


@pytest.mark.parametrize("kind", ["refused", "damaged", "lost"])
def test_no_folder_stays_locked_after_an_error(tmp_path, kind):
    """Not even by a caller that keeps the error, and has no `teardown` yet."""
    callback, _ = killed(tmp_path, 0)
    state = callback.state_dict()
    found = Path(state["folder"])
    strategy = types.SimpleNamespace(broadcast=lambda value: value)
    run = FakeTrainer(default_root_dir=str(tmp_path), strategy=strategy, current_epoch=3)
    folder = RunFolder(None, None)
    folder.settle(run)
    begin = partial(folder.begin_completion, run, ToyModule(seed=1), None, 3)
    if kind == "damaged":
        for path in (found / "snapshots").iterdir():
            path.write_bytes(path.read_bytes()[:-9])
    elif kind == "lost":
        shutil.rmtree(found / "snapshots")
        folder.resumes = True
        folder.load_state_dict(state)
        begin = partial(folder.begin_training, run, 3)
    with pytest.raises((ValueError, WeightMismatchError)) as error:
        begin()
    assert error.value is not None
    descriptor = os.open(found, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(descriptor)


class TestInTheSameProcess:
    def test_an_interrupted_training_has_its_snapshots_and_another_module_does_not(self, tmp_path):
        stops = Does("on_train_batch_start", lambda module: interrupt() if module.global_step == 5 else None)
        callback, module = killed(tmp_path, 0, stops, error=KeyboardInterrupt, dirpath=str(tmp_path / "given"))
        assert module.global_step == 5  # within the third epoch: no snapshot has these weights
        with pytest.raises(WeightMismatchError, match=REFUSED):
            completed(tmp_path, ToyModule(seed=1), callback)
        completed(tmp_path, module, callback)
        assert [epoch_of(path) for path in snapshots_of(callback)] == [0, 1]

    def test_other_weights_in_the_trained_module(self, tmp_path):
        callback, module = killed(tmp_path, 0, dirpath=str(tmp_path / "given"))
        module.load_state_dict(ToyModule(seed=1).state_dict())
        with pytest.raises(WeightMismatchError, match=REFUSED):
            completed(tmp_path, module, callback)

    def test_a_checkpoint_of_another_training_has_its_own(self, tmp_path):
        killed(tmp_path / "first", 0, dirpath=str(tmp_path / "first" / "given"))
        callback, _ = killed(tmp_path, 1, dirpath=str(tmp_path / "given"))
        expected = [snapshot_info(path).digest for path in sorted((tmp_path / "first/given/snapshots").iterdir())]
        path = str(tmp_path / "first" / "saved-0" / "epoch=2.ckpt")
        completed(tmp_path, ToyModule(seed=1), callback, path)
        assert [snapshot_info(path).digest for path in snapshots_of(callback)] == expected

    def test_a_checkpoint_without_a_run_is_not_of_the_one_before_it(self, tmp_path):
        killed(tmp_path, 0, dies=False, dirpath=str(tmp_path / "given"))
        path = tmp_path / "saved-0" / "epoch=2.ckpt"
        later = BayesianMoECallback(METHODS, dirpath=str(tmp_path / "later"))
        completed(tmp_path, ToyModule(), later, str(path))
        checkpoint = torch.load(path, weights_only=True)
        checkpoint["callbacks"] = {}
        checkpoint["state_dict"] = ToyModule(seed=1).state_dict()
        torch.save(checkpoint, tmp_path / "bare.ckpt")
        (tmp_path / "later" / "index.json").unlink()
        with pytest.raises(WeightMismatchError, match=REFUSED):
            completed(tmp_path, ToyModule(), later, str(tmp_path / "bare.ckpt"))


FIT, OTHER = "ab" * 16, "cd" * 16
WEIGHTS = [digit * 64 for digit in "0123"]


def written(folder, epoch, weights, fit=FIT):
    path = new_snapshot(folder, fit, epoch)
    save_snapshot(path, {"weight": torch.ones(2)}, fit=fit, weights=weights)
    return path


class TestRuns:
    def test_a_folder_without_one(self, tmp_path):
        assert killed_run(tmp_path) is None
        assert run_of_weights([tmp_path], WEIGHTS[0], uses_snapshots=True, resumes_pass=True) is None

    def test_one_that_had_no_snapshots(self, tmp_path):
        claim(tmp_path, FIT, FolderLock())
        assert killed_run(tmp_path).snapshots_for(WEIGHTS[0]) is None
        mark_weights(tmp_path, FIT, WEIGHTS[0])
        claim(tmp_path, FIT, FolderLock())
        assert killed_run(tmp_path).snapshots_for(WEIGHTS[0]) == []
        claim(tmp_path, OTHER, FolderLock())
        assert killed_run(tmp_path).snapshots_for(WEIGHTS[0]) is None

    def test_snapshots_up_to_the_weights(self, tmp_path):
        paths = [written(tmp_path, epoch, WEIGHTS[epoch]) for epoch in range(3)]
        assert killed_run(tmp_path).snapshots_for(WEIGHTS[1]) == paths[:2]
        assert killed_run(tmp_path).snapshots_for(WEIGHTS[3]) is None
        mark_weights(tmp_path, FIT, WEIGHTS[1])  # the best ones, say
        assert killed_run(tmp_path).snapshots_for(WEIGHTS[1]) == paths

    def test_snapshots_without_a_fingerprint_are_of_no_model(self, tmp_path):
        written(tmp_path, 0, "")
        assert killed_run(tmp_path).snapshots_for(WEIGHTS[0]) is None

    @pytest.mark.parametrize("uses_snapshots", [False, True])
    def test_a_pass_that_can_be_resumed_checks_the_weights_itself(self, tmp_path, uses_snapshots):
        claim(tmp_path, FIT, FolderLock())
        (tmp_path / f"curvature_state-{FIT[:8]}-ab.safetensors").touch()
        options = {"uses_snapshots": uses_snapshots}
        assert run_of_weights([tmp_path], WEIGHTS[0], resumes_pass=True, **options) == (tmp_path, FIT, [])
        assert run_of_weights([tmp_path], WEIGHTS[0], resumes_pass=False, **options) is None
