"""Where a run writes, and what it takes over from the run of a checkpoint: through the callback, as a user sees it."""

from __future__ import annotations

import shutil
import types
from contextlib import suppress
from pathlib import Path
from unittest import mock

import lightning as L
import pytest
import torch
import torch.distributed as dist
from fake_trainer import FakeTrainer
from forked_processes import run as run_in_processes
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from toy import ToyModule, calibration_loader, loader, test_loader, train_loader, trainer
from unprivileged import unprivileged_folder

from bmoe_lightning import BayesianMoECallback
from bmoe_lightning.laplace.posterior import WeightMismatchError
from bmoe_lightning.methods import CheckpointEnsemble, FitResult, save_snapshot
from bmoe_lightning.methods.storage import load_fit
from bmoe_lightning.trainer import run_folder
from bmoe_lightning.trainer.run_folder import RunFolder
from bmoe_lightning.trainer.snapshot_files import epoch_of
from bmoe_lightning.utils.distributed import OtherRankError

METHODS = ("map", "checkpoint_ensemble", "laplace_evidence")


def folder_of(callback):
    return Path(callback.state_dict()["folder"])


def same_factors(one, other):
    pairs = zip(*(next(iter(fit.posteriors.values())).factors.layers for fit in (one, other)), strict=True)
    return all(torch.equal(layer.a_basis, same.a_basis) for layer, same in pairs)


class Killed(Exception):
    pass


class Runs:
    """Runs whose logger has another folder each time, with a checkpoint after each of two epochs."""

    def __init__(self, root):
        self.root = root

    def trainer(self, *callbacks, **options):
        return trainer(self.root, list(callbacks), logger=CSVLogger(self.root), max_epochs=2, **options)

    def train(self, callback):
        L.seed_everything(0, verbose=False)
        saves = ModelCheckpoint(self.root, filename="{epoch}", save_top_k=-1)
        module = ToyModule()
        self.trainer(callback, saves, enable_checkpointing=True).fit(module, train_loader(), calibration_loader())
        return module

    def complete(self, callback, epoch=1, trainer=None):
        callback.fit_posterior(
            ToyModule(),
            trainer=trainer or self.trainer(callback),
            train_dataloaders=train_loader(),
            val_dataloaders=calibration_loader(),
            ckpt_path=str(self.root / f"epoch={epoch}.ckpt"),
        )


@pytest.fixture
def runs(tmp_path):
    return Runs(tmp_path)


def test_a_fit_that_is_completed_elsewhere_takes_its_snapshots_along(runs):
    first, second = BayesianMoECallback(METHODS), BayesianMoECallback((*METHODS, "temperature"))
    runs.train(first)
    runs.complete(second)
    assert folder_of(first) != folder_of(second)
    found, snapshots = load_fit(folder_of(second))
    assert set(found.methods) == {"checkpoint_ensemble", "laplace_evidence", "temperature"}
    assert found.fit_id == first.fitted.fit_id
    (_, originals) = load_fit(folder_of(first))  # as it was
    assert [path.read_bytes() for path in snapshots] == [path.read_bytes() for path in originals]
    assert len(snapshots) == 2


def test_weights_of_another_checkpoint_are_fitted_in_another_folder(runs):
    methods = ("map", "laplace_evidence")
    last, first = BayesianMoECallback(methods), BayesianMoECallback(methods, dirpath=str(runs.root / "other"))
    module = runs.train(last)
    runs.complete(first, epoch=0)
    found, kept = load_fit(folder_of(first))[0], load_fit(folder_of(last))[0]
    assert found.fingerprint == first.fitted.fingerprint != kept.fingerprint == last.fitted.fingerprint
    assert same_factors(found, first.fitted)
    assert not same_factors(found, kept)
    with pytest.raises(WeightMismatchError):
        runs.trainer(first).test(module, test_loader(), verbose=False)


@pytest.mark.parametrize("has_fit_in_memory", [False, True])
def test_a_fit_to_other_weights_is_not_replaced(runs, has_fit_in_memory):
    options = {"methods": ("map", "laplace_evidence"), "dirpath": str(runs.root / "given")}
    first = BayesianMoECallback(**options)
    runs.train(first)
    files = {path: path.read_bytes() for path in folder_of(first).iterdir()}
    callback = first if has_fit_in_memory else BayesianMoECallback(**options)
    with pytest.raises(WeightMismatchError, match=r"given has a fit to other weights .*another dirpath="):
        runs.complete(callback, epoch=0)
    assert {path: path.read_bytes() for path in folder_of(first).iterdir()} == files
    (folder_of(first) / "index.json").unlink()
    again = BayesianMoECallback(**options)
    runs.complete(again, epoch=0)
    assert load_fit(folder_of(first))[0].fingerprint == again.fitted.fingerprint


def test_snapshots_of_later_weights_are_not_used(runs):
    runs.train(BayesianMoECallback(METHODS))
    callback = BayesianMoECallback(METHODS, dirpath=str(runs.root / "other"))
    with pytest.raises(ValueError, match="at least 2 epochs, and there will be 1"):
        runs.complete(callback, epoch=0)


def test_the_best_weights_are_completed_too(runs):
    folder = str(runs.root / "given")
    saves = ModelCheckpoint(runs.root, filename="best", monitor="val_loss")
    L.seed_everything(0, verbose=False)
    first = BayesianMoECallback(("map", "laplace_evidence"), fit_at="best", dirpath=folder)
    run = runs.trainer(first, saves, enable_checkpointing=True)
    module = ToyModule()
    run.fit(module, train_loader(), calibration_loader())
    with torch.no_grad():
        module.network.model.layers[0].mlp.experts.down_proj.mul_(2)  # as if training had gone on after the best
    more = BayesianMoECallback(("map", "laplace_evidence", "temperature"), fit_at="best", dirpath=folder)
    run.callbacks[run.callbacks.index(first)] = more
    more.fit_posterior(
        module, trainer=run, train_dataloaders=train_loader(), val_dataloaders=calibration_loader(),
        prior_mean={name: p.detach() for name, p in ToyModule().named_parameters() if "down_proj" in name},
    )  # fmt: skip
    assert more.fitted.fit_id == first.fitted.fit_id
    assert more.fitted.methods.keys() == {"laplace_evidence", "temperature"}


def test_a_killed_pass_in_another_folder_is_named(runs):
    batches = []

    def class_logits(module, batch):
        batches.append(batch)
        if len(batches) == 5:
            raise Killed
        return module.class_logits(batch)

    first = BayesianMoECallback(("map", "laplace_lpo"), class_logits=class_logits, curvature_checkpoint_every=1)
    with pytest.raises(Killed):
        runs.train(first)
    assert list(folder_of(first).glob("curvature_state-*"))
    second = BayesianMoECallback(("map", "laplace_lpo"), curvature_checkpoint_every=1)
    with pytest.warns(UserWarning, match=f"pass dirpath='{folder_of(first)}' to resume it"):
        runs.complete(second)
    batches.clear()
    third = BayesianMoECallback(
        ("map", "laplace_lpo"), class_logits=lambda m, b: batches.append(b) or m.class_logits(b),
        curvature_checkpoint_every=1, dirpath=str(folder_of(first)),
    )  # fmt: skip
    runs.complete(third)
    # The first run was killed in the third batch of the pass, after the first batch of each loader.
    assert len(batches) == 2 + (10 - 2) + 7  # these again, what was left of the pass, and calibration


class OneFolder(DummyLogger):
    """As the loggers of Weights & Biases and MLflow: one `save_dir` for all runs."""

    def __init__(self, save_dir, version):
        super().__init__()
        self._save_dir, self._version = save_dir and str(save_dir), version

    save_dir = property(lambda self: self._save_dir)
    name = property(lambda self: "project")
    version = property(lambda self: self._version)


class TestFoldersOfRuns:
    METHODS = ("map", "temperature")

    def fit(self, folder, seed, *callbacks, **options):
        callback = BayesianMoECallback(self.METHODS)
        run = trainer(folder, [callback, *callbacks], max_epochs=1, **options)
        run.fit(ToyModule(seed=seed), loader(32, 1), loader(32, 2))
        return run

    def folders(self, root):
        return sorted(path.parent.relative_to(root).as_posix() for path in root.rglob("index.json"))

    def test_a_logger_with_one_folder_for_all_runs(self, tmp_path):
        for number in (0, 1):
            self.fit(tmp_path, number, logger=OneFolder(tmp_path / "logs", f"run-{number}"))
        found = self.folders(tmp_path / "logs")
        assert found == [f"project/run-{number}/bayesian_moe" for number in (0, 1)]

    @pytest.mark.parametrize(
        "logger",
        [
            lambda root: CSVLogger(root / "logs", name="mine"),
            lambda root: CSVLogger(root / "logs", name="", version="a"),
            lambda root: TensorBoardLogger(root / "logs", name="mine", sub_dir="sub"),
            lambda root: OneFolder(root / "logs", "run-1"),
            lambda root: OneFolder(root / "logs", 3),
            lambda root: OneFolder(None, "run-1"),  # MLflow with a server
            lambda root: [OneFolder(root / "logs", "run-1"), CSVLogger(root / "more")],
            lambda root: False,
        ],
    )
    def test_is_beside_the_checkpoints_of_lightning(self, tmp_path, logger):
        saves = ModelCheckpoint()
        self.fit(tmp_path, 0, saves, logger=logger(tmp_path), enable_checkpointing=True)
        assert self.folders(tmp_path) == [
            (Path(saves.dirpath).parent / "bayesian_moe").relative_to(tmp_path).as_posix()
        ]

    def test_without_a_logger_no_run_replaces_another_one(self, tmp_path):
        runs = [self.fit(tmp_path, seed) for seed in (0, 1, 2)]
        assert self.folders(tmp_path) == ["bayesian_moe", "bayesian_moe-v1", "bayesian_moe-v2"]
        # A later process finds the last one; a checkpoint finds its own.
        later = trainer(tmp_path, [BayesianMoECallback(self.METHODS)])
        assert "temperature/test/nll" in later.test(runs[2].lightning_module, test_loader(), verbose=False)[0]
        runs[0].save_checkpoint(tmp_path / "a.ckpt")
        first = trainer(tmp_path, [BayesianMoECallback(self.METHODS)])
        found = first.test(
            ToyModule(), test_loader(), ckpt_path=str(tmp_path / "a.ckpt"), weights_only=True, verbose=False
        )
        assert "temperature/test/nll" in found[0]

    @pytest.mark.parametrize("has_logger", [False, True])
    def test_a_new_process_finds_the_fit_to_its_weights_among_all_runs(self, tmp_path, has_logger):
        """Without a checkpoint that would name the folder."""

        def logger():
            return CSVLogger(tmp_path, name="runs") if has_logger else False

        runs = [self.fit(tmp_path, seed, logger=logger()) for seed in (0, 1, 2)]
        folders = [path.parent for path in sorted(tmp_path.rglob("index.json"))]
        fits = [load_fit(folder)[0] for folder in folders]
        content = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        for run, fit in zip(runs, fits, strict=True):
            later = BayesianMoECallback(self.METHODS)
            metrics = trainer(tmp_path, [later], logger=logger()).test(
                run.lightning_module, test_loader(), verbose=False
            )
            assert later.fitted.fit_id == fit.fit_id
            assert "temperature/test/nll" in metrics[0]
            if not has_logger:
                assert folder_of(later) == folders[fits.index(fit)]
        # None is to other weights: all are named, and a validation before training has its baseline.
        with pytest.raises(WeightMismatchError) as refused:
            trainer(tmp_path, [BayesianMoECallback(self.METHODS)], logger=logger()).test(
                ToyModule(seed=5), test_loader(), verbose=False
            )
        with pytest.warns(UserWarning, match=r"temperature are not evaluated in this validation: none of 3") as said:
            metrics = trainer(tmp_path, [BayesianMoECallback(self.METHODS)], logger=logger()).validate(
                ToyModule(seed=5), test_loader(), verbose=False
            )
        assert "map/val/nll" in metrics[0]
        for folder in folders:
            assert f"{folder} has a fit to other weights than the model has (35 parameters" in str(refused.value)
            assert any(str(folder) in str(warning.message) for warning in said)
        assert all(path.read_bytes() == before for path, before in content.items())

    @pytest.mark.parametrize("by", ["checkpoint", "weights"])
    def test_completing_the_first_run_leaves_the_second(self, tmp_path, by):
        runs = [self.fit(tmp_path, seed) for seed in (0, 1)]
        runs[0].save_checkpoint(tmp_path / "first.ckpt")
        second = {path: path.read_bytes() for path in (tmp_path / "bayesian_moe-v1").iterdir()}
        more = BayesianMoECallback((*self.METHODS, "shrunk_temperature"))
        more.fit_posterior(
            runs[0].lightning_module if by == "weights" else ToyModule(), trainer=trainer(tmp_path, [more]),
            train_dataloaders=loader(32, 1), val_dataloaders=loader(32, 2),
            ckpt_path=str(tmp_path / "first.ckpt") if by == "checkpoint" else None,
        )  # fmt: skip
        assert folder_of(more) == tmp_path / "bayesian_moe"
        assert set(load_fit(folder_of(more))[0].methods) == {"temperature", "shrunk_temperature"}
        assert {path: path.read_bytes() for path in (tmp_path / "bayesian_moe-v1").iterdir()} == second
        # Other weights get the next version.
        third = BayesianMoECallback(self.METHODS)
        third.fit_posterior(
            ToyModule(seed=2), trainer=trainer(tmp_path, [third]), train_dataloaders=loader(32, 1),
            val_dataloaders=loader(32, 2),
        )  # fmt: skip
        assert folder_of(third) == tmp_path / "bayesian_moe-v2"
        assert {path: path.read_bytes() for path in (tmp_path / "bayesian_moe-v1").iterdir()} == second

    def test_one_callback_finds_the_fits_of_two_checkpoints(self, tmp_path):
        for seed in (0, 1):
            self.fit(tmp_path, seed).save_checkpoint(tmp_path / f"{seed}.ckpt")
        later = BayesianMoECallback(self.METHODS)
        run = trainer(tmp_path, [later])
        for name in ("bayesian_moe", "bayesian_moe-v1"):
            path = str(tmp_path / f"{int('v1' in name)}.ckpt")
            run.test(ToyModule(), test_loader(), ckpt_path=path, weights_only=True, verbose=False)
            assert later.fitted.fit_id == load_fit(tmp_path / name)[0].fit_id

    @pytest.mark.parametrize("logger", [lambda _: False, lambda root: OneFolder(root, None)])
    def test_runs_at_the_same_time_have_folders_of_their_own(self, tmp_path, logger):
        outer = self

        class Meanwhile(L.Callback):
            def on_train_epoch_end(self, trainer, pl_module):
                outer.fit(tmp_path, 1, logger=logger(tmp_path))

        self.fit(tmp_path, 0, Meanwhile(), logger=logger(tmp_path))
        assert [Path(name).name for name in self.folders(tmp_path)] == ["bayesian_moe", "bayesian_moe-v1"]
        assert not list(tmp_path.rglob(".training"))

    def test_a_killed_run_keeps_its_folder_until_it_is_resumed(self, tmp_path):
        saves = ModelCheckpoint(tmp_path / "saved", save_last=True, save_on_train_epoch_end=False)
        with pytest.raises(Killed):
            self.fit(tmp_path, 0, saves, Dies(at="on_train_epoch_end"), enable_checkpointing=True)
        self.fit(tmp_path, 1)
        assert self.folders(tmp_path) == ["bayesian_moe-v1"]
        resumed = BayesianMoECallback(self.METHODS)
        trainer(tmp_path, [resumed], max_epochs=2).fit(
            ToyModule(), loader(32, 1), loader(32, 2), ckpt_path=str(tmp_path / "saved" / "last.ckpt")
        )
        assert self.folders(tmp_path) == ["bayesian_moe", "bayesian_moe-v1"]
        assert folder_of(resumed).name == "bayesian_moe"

    @pytest.mark.parametrize("by", ["training", "completion"])
    def test_a_branch_of_a_finished_run_leaves_its_fit(self, tmp_path, by):
        methods = (*self.METHODS, *([CheckpointEnsemble(num_snapshots=2)] if by == "training" else []))

        def run(callback, epochs):
            saves = ModelCheckpoint(tmp_path / "saved", filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
            return trainer(tmp_path, [callback, saves], max_epochs=epochs, enable_checkpointing=True)

        first, branch = BayesianMoECallback(methods), BayesianMoECallback(methods)
        run(first, 2).fit(ToyModule(), loader(32, 1), loader(32, 2))
        files = {path: path.read_bytes() for path in folder_of(first).rglob("*") if path.is_file()}
        start = str(tmp_path / "saved" / "epoch=0.ckpt")
        if by == "training":
            module = ToyModule(learning_rate=0.03)
            run(branch, 3).fit(module, loader(32, 1), loader(32, 2), ckpt_path=start, weights_only=True)
            last = [tmp_path / "saved" / name for name in ("epoch=1.ckpt", "epoch=2.ckpt")]
            members = [1, 2]
        else:
            branch.fit_posterior(
                ToyModule(), trainer=run(branch, 1), train_dataloaders=loader(32, 1), val_dataloaders=loader(32, 2),
                ckpt_path=start,
            )  # fmt: skip
            last, members = [tmp_path / "saved" / "epoch=1.ckpt", Path(start)], []
        assert self.folders(tmp_path) == ["bayesian_moe", "bayesian_moe-v1"]
        assert {path: path.read_bytes() for path in files} == files
        assert not list(tmp_path.rglob(".training"))
        assert [epoch_of(path) for path in load_fit(folder_of(branch))[1]] == members
        for callback, checkpoint in zip((first, branch), last, strict=True):
            later = BayesianMoECallback(methods)
            run(later, 1).test(ToyModule(), test_loader(), ckpt_path=str(checkpoint), weights_only=True, verbose=False)
            assert later.fitted.fit_id == callback.fitted.fit_id
        assert branch.fitted.fit_id != first.fitted.fit_id

    def test_a_folder_that_the_user_named_is_that_folder(self, tmp_path):
        for seed in (0, 1):
            callback = BayesianMoECallback(self.METHODS, dirpath=str(tmp_path / "mine"))
            trainer(tmp_path, [callback], max_epochs=1).fit(ToyModule(seed=seed), loader(32, 1), loader(32, 2))
        assert self.folders(tmp_path) == ["mine"]

    def test_two_callbacks_have_a_subfolder_each(self, tmp_path):
        callbacks = [BayesianMoECallback(self.METHODS, name=name) for name in ("b", "", "a")]
        run = trainer(tmp_path, callbacks, max_epochs=1)
        run.fit(ToyModule(), loader(32, 1), loader(32, 2))
        assert self.folders(tmp_path) == ["bayesian_moe", "bayesian_moe/a", "bayesian_moe/b"]


class Dies(L.Callback):
    """Stands for `kill -9` in a hook."""

    def __init__(self, at):
        setattr(self, at, self.die)

    def die(self, *_):
        raise Killed


class TestResumedRuns:
    """Of a run of six epochs with a checkpoint after each."""

    METHODS = ("map", "temperature", CheckpointEnsemble(num_snapshots=4))

    def callback(self, **options):
        return BayesianMoECallback(**{"methods": self.METHODS, **options})

    def fit(self, root, epochs, *callbacks, checkpoint=None, **options):
        callback = self.callback(**options)
        saves = ModelCheckpoint(filename="{epoch}", save_top_k=-1)
        run = trainer(
            root, [callback, *callbacks, saves], max_epochs=epochs, logger=CSVLogger(root), enable_checkpointing=True
        )
        module = ToyModule()
        L.seed_everything(0, verbose=False)
        steps = []
        module.register_forward_pre_hook(lambda *_: steps.append(1))
        try:
            run.fit(module, loader(32, 1), loader(32, 2), ckpt_path=checkpoint, weights_only=True)
        except Exception:
            assert not run.callback_metrics  # nothing was trained
            raise
        return callback

    def checkpoint(self, root, epoch, version=0):
        return str(root / "lightning_logs" / f"version_{version}" / "checkpoints" / f"epoch={epoch}.ckpt")

    def members(self, callback):
        return callback.fitted.methods["checkpoint_ensemble"].state["members"].item()

    def test_in_a_new_folder_uses_the_snapshots_of_the_first(self, tmp_path):
        first = self.fit(tmp_path, 3)
        files = {path: path.read_bytes() for path in folder_of(first).rglob("*") if path.is_file()}
        second = self.fit(tmp_path, 5, checkpoint=self.checkpoint(tmp_path, 2))
        assert folder_of(second) != folder_of(first)
        assert self.members(second) == len(load_fit(folder_of(second))[1]) == 4
        assert {path: path.read_bytes() for path in files} == files
        load_fit(folder_of(first))

    @pytest.mark.parametrize("given", [True, False])
    def test_a_relative_folder_of_another_working_directory(self, tmp_path, monkeypatch, given):
        options = {"dirpath": "fit"} if given else {}
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / "one")
        self.fit(Path("logs"), 3, **options)
        monkeypatch.chdir(tmp_path / "two")
        checkpoint = self.checkpoint(tmp_path / "one" / "logs", 2)
        second = self.fit(Path("logs"), 5, checkpoint=checkpoint, **options)
        assert self.members(second) == 4
        assert folder_of(second).is_relative_to(tmp_path / "two")

    def test_in_a_run_folder_that_was_moved(self, tmp_path):
        self.fit(tmp_path / "old", 3)
        (tmp_path / "old").rename(tmp_path / "new")
        second = self.fit(tmp_path / "new", 5, checkpoint=self.checkpoint(tmp_path / "new", 2))
        assert self.members(second) == 4
        assert not (tmp_path / "old").exists()

    @pytest.mark.parametrize("epochs", [4, 5, 6])
    def test_without_the_snapshots_it_is_refused_before_training(self, tmp_path, epochs):
        first = self.fit(tmp_path / "old", 3)
        (folder_of(first) / "snapshots" / load_fit(folder_of(first))[1][1].name).unlink()
        if epochs == 6:  # epochs 2 to 5 are used, and that of epoch 1 is gone
            assert self.members(self.fit(tmp_path, 6, checkpoint=self.checkpoint(tmp_path / "old", 2))) == 4
            return
        with pytest.raises(ValueError, match=r"snapshots that .* does not have, .*Leave the folder of the run beside"):
            self.fit(tmp_path, epochs, checkpoint=self.checkpoint(tmp_path / "old", 2))
        # Other methods do not use them.
        self.fit(tmp_path, epochs, checkpoint=self.checkpoint(tmp_path / "old", 2), methods=("map", "temperature"))

    def test_in_the_same_folder_leaves_the_fit_until_there_is_another(self, tmp_path):
        """Epochs that are trained again, and a kill before the second fit."""
        folder = str(tmp_path / "given")
        self.fit(tmp_path, 4, dirpath=folder)
        found, snapshots = load_fit(Path(folder))
        content = [path.read_bytes() for path in snapshots]
        with pytest.raises(Killed):
            self.fit_killed(tmp_path, folder)
        again, same = load_fit(Path(folder))
        assert (again.fit_id, again.fingerprint) == (found.fit_id, found.fingerprint)
        assert [path.read_bytes() for path in same] == content
        last = self.fit(tmp_path, 6, checkpoint=self.checkpoint(tmp_path, 1), dirpath=folder)
        assert [epoch_of(path) for path in load_fit(Path(folder))[1]] == [2, 3, 4, 5]
        assert self.members(last) == 4

    def test_snapshots_of_epochs_that_were_trained_again_are_not_those_of_a_checkpoint(self, tmp_path):
        """The run removed its own, and another attempt from an earlier checkpoint was killed."""
        methods = ("map", CheckpointEnsemble(num_snapshots=2))
        options = {"dirpath": str(tmp_path / "given"), "methods": methods}
        self.fit(tmp_path, 4, **options)
        dies = Dies("on_train_epoch_end")
        run = trainer(tmp_path, [self.callback(**options), dies], max_epochs=3, logger=CSVLogger(tmp_path))
        first = self.checkpoint(tmp_path, 0)
        with pytest.raises(Killed):
            run.fit(ToyModule(), loader(32, 9), loader(32, 2), ckpt_path=first, weights_only=True)
        with pytest.raises(ValueError, match=r"the checkpoint names 1 snapshots that .* does not have"):
            self.fit(tmp_path, 3, checkpoint=self.checkpoint(tmp_path, 1), **options)

    def fit_killed(self, root, folder):
        callback = self.callback(dirpath=folder)
        run = trainer(root, [callback, Dies("on_train_end")], max_epochs=6, logger=CSVLogger(root))
        run.callbacks.reverse()  # dies before the fit
        run.fit(ToyModule(), loader(32, 1), loader(32, 2), ckpt_path=self.checkpoint(root, 1), weights_only=True)

    def test_a_crafted_checkpoint_deletes_and_leaves_nothing_elsewhere(self, tmp_path):
        self.fit(tmp_path, 3)
        (tmp_path / "precious").mkdir()
        precious = tmp_path / "precious" / "thesis.txt"
        precious.write_text("mine")
        other = tmp_path / "precious" / "0badc0de-epoch-0001.safetensors"
        save_snapshot(other, {"x": torch.ones(1)}, fit="0badc0de" * 4)
        before = {path: path.read_bytes() for path in (precious, other)}
        path = self.checkpoint(tmp_path, 2)
        for folder, fit, names in (
            (tmp_path, "0" * 32, [str(precious), "../../precious/thesis.txt", str(other)]),
            (tmp_path / "precious", "0badc0de" * 4, [other.name] * 9),
            (tmp_path / "precious", "../../pre", [str(other), other.name]),
        ):
            checkpoint = torch.load(path, weights_only=True)
            for key, state in checkpoint["callbacks"].items():
                if "BayesianMoE" in key:
                    state |= {"folder": str(folder), "fit": fit, "snapshots": names}
            torch.save(checkpoint, tmp_path / "crafted.ckpt")
            with suppress(ValueError):
                self.fit(tmp_path, 7, checkpoint=str(tmp_path / "crafted.ckpt"), dirpath=str(tmp_path / "run"))
            assert {path: path.read_bytes() for path in before} == before
            assert sorted(path.name for path in (tmp_path / "precious").iterdir()) == sorted(p.name for p in before)


class TestPathsOfACheckpoint:
    """Whatever its state says, what is found beside it is used; else one sentence names the folder."""

    METHODS = ("map", "temperature")

    @pytest.fixture(scope="class")
    def run(self, tmp_path_factory):
        root = tmp_path_factory.mktemp("paths")
        saves = ModelCheckpoint(root / "run" / "saved", filename="last")
        callback = BayesianMoECallback(self.METHODS, dirpath=str(root / "run" / "mine"))
        trainer(root, [callback, saves], max_epochs=1, enable_checkpointing=True).fit(
            ToyModule(), loader(32, 1), loader(32, 2)
        )
        return root / "run"

    def crafted(self, checkpoint, root, folder):
        for key, state in checkpoint["callbacks"].items():
            if "BayesianMoE" in key:
                state["folder"] = folder
        (root / "saved").mkdir(exist_ok=True)
        torch.save(checkpoint, root / "saved" / "crafted.ckpt")
        return str(root / "saved" / "crafted.ckpt")

    def metrics_of(self, root, checkpoint):
        run = trainer(root / "here", [BayesianMoECallback(self.METHODS)])
        return run.test(ToyModule(), test_loader(), ckpt_path=checkpoint, weights_only=True, verbose=False)[0]

    @pytest.mark.parametrize(
        ("folder", "error", "said"),
        [
            ("{root}/missing", RuntimeError, "no fit was found in {root}/missing, "),
            ("{root}/file", RuntimeError, "no fit was found in {root}/file, "),
            ("{root}/dangling", RuntimeError, "no fit was found in {root}/dangling, "),
            ("{root}/loop", OSError, "the folder {root}/loop of a fit cannot be read .Too many levels"),
            ("{root}/" + "x" * 300, OSError, "the folder .*xxx.* of a fit cannot be read .File name too long"),
            ("{root}/a\0b", ValueError, "state of BayesianMoECallback is damaged"),
            ("..", RuntimeError, "no fit was found in "),
            ("/", RuntimeError, "no fit was found in /, "),
            ("{root}/saved/../..", RuntimeError, "no fit was found in "),
        ],
    )
    def test_is_one_sentence(self, run, tmp_path, folder, error, said):
        (tmp_path / "file").write_text("")
        (tmp_path / "dangling").symlink_to(tmp_path / "gone")
        (tmp_path / "loop").symlink_to("loop")
        found = torch.load(run / "saved" / "last.ckpt", weights_only=True)
        checkpoint = self.crafted(found, tmp_path, folder.format(root=tmp_path))
        with pytest.raises(error, match=said.format(root=tmp_path)):
            self.metrics_of(tmp_path, checkpoint)
        if error is ValueError:
            return
        # With the fit beside it, and for a run that resumes it.
        shutil.copytree(run / "mine", tmp_path / "bayesian_moe")
        assert "temperature/test/nll" in self.metrics_of(tmp_path, checkpoint)
        again = BayesianMoECallback(("map", "temperature", CheckpointEnsemble(num_snapshots=2)))
        trainer(tmp_path / "there", [again], max_epochs=3).fit(
            ToyModule(), loader(32, 1), loader(32, 2), ckpt_path=checkpoint, weights_only=True
        )
        assert folder_of(again) == tmp_path / "there" / "bayesian_moe"
        assert again.fitted.methods["checkpoint_ensemble"].state["members"].item() == 2

    def test_a_folder_that_cannot_be_entered(self, run):
        found = torch.load(run / "saved" / "last.ckpt", weights_only=True)
        with unprivileged_folder() as root:
            (root / "closed").mkdir()
            checkpoint = self.crafted(found, root, str(root / "closed" / "fit"))
            (root / "closed").chmod(0)
            with pytest.raises(PermissionError, match=f"the folder {root}/closed/fit of a fit cannot be read"):
                self.metrics_of(root, checkpoint)
            again = BayesianMoECallback(self.METHODS)
            trainer(root / "there", [again], max_epochs=2).fit(
                ToyModule(), loader(32, 1), loader(32, 2), ckpt_path=checkpoint, weights_only=True
            )
            assert "temperature" in again.fitted.methods


class TestMovedRuns:
    METHODS = ("map", "temperature", "laplace_evidence")

    @pytest.fixture
    def moved(self, tmp_path):
        for seed in (0, 1):
            root = tmp_path / f"old-{seed}"
            saves = ModelCheckpoint(filename="last")
            run = trainer(
                root, [BayesianMoECallback(self.METHODS), saves], max_epochs=1, logger=CSVLogger(root),
                enable_checkpointing=True,
            )  # fmt: skip
            run.fit(ToyModule(seed=seed), loader(32, 1), loader(32, 2))
            root.rename(tmp_path / f"new-{seed}")
        return [tmp_path / f"new-{seed}" / "lightning_logs" / "version_0" for seed in (0, 1)]

    def metrics_of(self, root, checkpoint, **options):
        callback = BayesianMoECallback(self.METHODS, **options)
        run = trainer(root, [callback])
        return run.test(ToyModule(), test_loader(), ckpt_path=str(checkpoint), weights_only=True, verbose=False)[0]

    def test_a_checkpoint_finds_the_folder_beside_it(self, moved, tmp_path):
        found = [self.metrics_of(tmp_path / "here", folder / "checkpoints" / "last.ckpt") for folder in moved]
        assert found[0]["laplace_evidence/test/nll"] != found[1]["laplace_evidence/test/nll"]

    def test_another_run_that_now_has_its_old_place_is_not_taken(self, moved, tmp_path):
        """A fit with the right weights, and not the first that is found."""
        expected = self.metrics_of(tmp_path / "here", moved[0] / "checkpoints" / "last.ckpt")
        shutil.copytree(tmp_path / "new-1", tmp_path / "old-0")
        assert self.metrics_of(tmp_path / "here", moved[0] / "checkpoints" / "last.ckpt") == expected

    def test_weights_without_the_state_of_callbacks(self, moved, tmp_path):
        path = moved[0] / "checkpoints" / "last.ckpt"
        expected = self.metrics_of(tmp_path / "here", path)
        checkpoint = torch.load(path, weights_only=True)
        del checkpoint["callbacks"]
        torch.save(checkpoint, path)
        assert self.metrics_of(tmp_path / "here", path) == expected

    def test_a_fit_to_other_weights_beside_it_is_refused(self, moved, tmp_path):
        path = moved[0] / "checkpoints" / "last.ckpt"
        shutil.rmtree(moved[0] / "bayesian_moe")
        shutil.copytree(moved[1] / "bayesian_moe", moved[0] / "bayesian_moe")
        with pytest.raises(WeightMismatchError):
            self.metrics_of(tmp_path / "here", path)


PASS = {"methods": ("map", "laplace_lpo"), "curvature_checkpoint_every": 1}


class TestKilledFits:
    """A second run in a folder with a fit, killed in its curvature pass."""

    def train(self, root, seed, kill=False, **options):
        passes = []

        def class_logits(module, batch):
            passes.append(1)
            if kill and len(passes) == 5:
                raise Killed
            return module.class_logits(batch)

        callback = BayesianMoECallback(**PASS, dirpath=str(root / "given"), class_logits=class_logits)
        saves = ModelCheckpoint(root / f"saved-{seed}", filename="last", save_on_train_epoch_end=True)
        run = trainer(root, [callback, saves], max_epochs=1, enable_checkpointing=True, **options)
        module = ToyModule(seed=seed)
        L.seed_everything(0, verbose=False)
        run.fit(module, loader(64, 1), loader(32, 2))
        return callback

    def complete(self, root, module, checkpoint=None, **options):
        callback = BayesianMoECallback(**{**PASS, **options}, dirpath=str(root / "given"))
        callback.fit_posterior(
            module, trainer=trainer(root, [callback]), train_dataloaders=loader(64, 1),
            val_dataloaders=loader(32, 2), ckpt_path=checkpoint,
        )  # fmt: skip
        return callback

    def passes(self, root):
        return sorted(path.name for path in (root / "given").glob("curvature_state-*"))

    @pytest.mark.parametrize("by", ["checkpoint", "pass"])
    def test_is_completed_and_replaces_the_first(self, tmp_path, by):
        first = self.train(tmp_path, 0)
        with pytest.raises(Killed):
            self.train(tmp_path, 1, kill=True)
        assert load_fit(tmp_path / "given")[0].fit_id == first.fitted.fit_id
        (left,) = self.passes(tmp_path)
        checkpoint = str(tmp_path / "saved-1" / "last.ckpt")
        module = ToyModule(seed=1)
        if by == "pass":
            module.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
        callback = self.complete(tmp_path, module, checkpoint if by == "checkpoint" else None)
        found = load_fit(tmp_path / "given")[0]
        assert found.fit_id == callback.fitted.fit_id != first.fitted.fit_id
        assert found.fit_id[:8] in left
        assert self.passes(tmp_path) == []

    def test_other_weights_do_not_replace_the_first(self, tmp_path):
        first = self.train(tmp_path, 0)
        with pytest.raises(Killed):
            self.train(tmp_path, 1, kill=True)
        with pytest.raises(ValueError, match="other weights"):
            self.complete(tmp_path, ToyModule(seed=2))
        with pytest.raises(WeightMismatchError):  # no pass could tell
            self.complete(tmp_path, ToyModule(seed=2), curvature_checkpoint_every=None)
        self.complete(tmp_path, ToyModule(), str(tmp_path / "saved-0" / "last.ckpt"))  # the first's own
        assert load_fit(tmp_path / "given")[0].fit_id == first.fitted.fit_id

    def test_training_anew_leaves_the_pass_of_a_killed_run(self, tmp_path):
        with pytest.raises(Killed):
            self.train(tmp_path, 0, kill=True)
        (left,) = self.passes(tmp_path)
        content = (tmp_path / "given" / left).read_bytes()
        self.train(tmp_path, 1)
        assert self.passes(tmp_path) == [left]
        assert (tmp_path / "given" / left).read_bytes() == content


def failing_on_rank_zero(rank, world_size):
    """Whatever rank 0 cannot do, all ranks raise, instead of waiting for it."""
    strategy = types.SimpleNamespace(broadcast=broadcast_object)
    run = FakeTrainer(world_size=world_size, is_global_zero=rank == 0, strategy=strategy)
    expected, said = (OSError, "disk full") if rank == 0 else (OtherRankError, "on rank 0: OSError: disk full")

    def full(*_, **__):
        raise OSError("disk full")

    folder = RunFolder("fit", None)
    folder.settle(run)
    module = torch.nn.Linear(2, 2)
    for name, action in {
        "claim": lambda: folder.begin_training(run),
        "run_of_weights": lambda: folder.begin_completion(run, module, None),
        "save_snapshot": lambda: folder.save_snapshot(run, module, 2),
        "save_fit": lambda: folder.save(run, FitResult()),
        "has_fit": lambda: folder.load(run, module),
    }.items():
        with mock.patch.object(run_folder, name, full if rank == 0 else lambda *_, **__: []):
            with pytest.raises(expected, match=said):
                action()
            dist.barrier()
    dist.barrier()


def broadcast_object(value):
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def test_an_error_of_rank_zero_is_raised_on_all_ranks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_in_processes(failing_on_rank_zero, 2, tmp_path)


def test_a_folder_that_cannot_be_written_to_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    module = ToyModule()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    callback = BayesianMoECallback(dirpath=str(tmp_path / "file" / "fit"))
    with pytest.raises(OSError, match=r"file is not a writable folder \(Not a directory\); pass another dirpath="):
        trainer(tmp_path, [callback], max_epochs=1).fit(module, train_loader(), calibration_loader())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_a_full_disk_is_told_before_training(tmp_path, monkeypatch):
    """Permissions allow it; only a write tells."""

    def full(_):
        raise OSError(28, "No space left on device")

    module = ToyModule()
    callback = BayesianMoECallback(dirpath=str(tmp_path / "fit"))
    monkeypatch.setattr("bmoe_lightning.trainer.folders.os.fsync", full)
    run = trainer(tmp_path, [callback], max_epochs=1)
    with pytest.raises(
        OSError, match=r"cannot be written to .*fit: .*\(No space left on device\); pass another dirpath="
    ):
        run.fit(module, train_loader(), calibration_loader())
    assert run.global_step == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a/b", "../x", ".."])
def test_a_name_that_leaves_the_folder_is_refused(name):
    with pytest.raises(ValueError, match="name becomes a folder"):
        BayesianMoECallback(name=name)


def test_a_name_like_a_version_is_refused():
    with pytest.raises(ValueError, match="'a-v1' ends like the version of another run's folder"):
        RunFolder(None, None, "a-v1")
