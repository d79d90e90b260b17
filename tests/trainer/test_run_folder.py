"""Where a run writes, and what it takes over from the run of a checkpoint: through the callback, as a user sees it."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyLogger
from toy import ToyModule, calibration_loader, test_loader, train_loader, trainer

from bmoe_lightning import BayesianMoECallback
from bmoe_lightning.laplace.posterior import WeightMismatchError
from bmoe_lightning.methods.storage import load_fit

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
    assert len(batches) == 10 - 4 + 7  # of the curvature pass what was left


class OneFolder(DummyLogger):
    """As the loggers of Weights & Biases and MLflow: one `save_dir` for all runs."""

    def __init__(self, save_dir, version):
        super().__init__()
        self._save_dir, self._version = str(save_dir), version

    save_dir = property(lambda self: self._save_dir)
    name = property(lambda self: "project")
    version = property(lambda self: self._version)


class TestFoldersOfRuns:
    METHODS = ("map", "temperature")

    def fit(self, folder, seed, **options):
        callback = BayesianMoECallback(self.METHODS)
        run = trainer(folder, [callback], max_epochs=1, **options)
        run.fit(ToyModule(seed=seed), train_loader(), calibration_loader())
        return run

    def folders(self, root):
        return sorted(path.parent.relative_to(root).as_posix() for path in root.rglob("index.json"))

    def test_a_logger_with_one_folder_for_all_runs(self, tmp_path):
        for number in (0, 1):
            self.fit(tmp_path, number, logger=OneFolder(tmp_path / "logs", f"run-{number}"))
        found = self.folders(tmp_path / "logs")
        assert found == [f"project/run-{number}/bayesian_moe" for number in (0, 1)]

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

    def test_a_folder_that_the_user_named_is_that_folder(self, tmp_path):
        for seed in (0, 1):
            callback = BayesianMoECallback(self.METHODS, dirpath=str(tmp_path / "mine"))
            trainer(tmp_path, [callback], max_epochs=1).fit(ToyModule(seed=seed), train_loader(), calibration_loader())
        assert self.folders(tmp_path) == ["mine"]


def test_a_folder_that_cannot_be_written_to_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    module = ToyModule()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    callback = BayesianMoECallback(dirpath=str(tmp_path / "file" / "fit"))
    with pytest.raises(OSError, match=r"file is not a writable folder; pass another dirpath="):
        trainer(tmp_path, [callback], max_epochs=1).fit(module, train_loader(), calibration_loader())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("name", ["a/b", "../x", ".."])
def test_a_name_that_leaves_the_folder_is_refused(name):
    with pytest.raises(ValueError, match="name becomes a folder"):
        BayesianMoECallback(name=name)
