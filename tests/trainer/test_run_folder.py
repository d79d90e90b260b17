"""Where a completed fit is written, and what no run can write to: through the callback, as a user sees it."""

from __future__ import annotations

import types
from unittest import mock

import lightning as L
import pytest
import torch
import torch.distributed as dist
from fake_trainer import FakeTrainer
from forked_processes import run as run_in_processes
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from run_folder_cases import Killed, folder_of
from toy import ToyModule, calibration_loader, test_loader, train_loader, trainer

from bmoe_lightning import BayesianMoECallback
from bmoe_lightning.laplace.posterior import WeightMismatchError
from bmoe_lightning.methods import FitResult
from bmoe_lightning.methods.storage import load_fit
from bmoe_lightning.trainer import run_folder
from bmoe_lightning.trainer.run_folder import RunFolder
from bmoe_lightning.utils.distributed import OtherRankError

METHODS = ("map", "checkpoint_ensemble", "laplace_evidence")


def same_factors(one, other):
    pairs = zip(*(next(iter(fit.posteriors.values())).factors.layers for fit in (one, other)), strict=True)
    return all(torch.equal(layer.a_basis, same.a_basis) for layer, same in pairs)


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
        if len(batches) == 6:
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
    # The first run was killed in the second batch of the pass, after the checks of first batches and the first batch,
    # which like the next three runs once more, for the gradients of the trained weights.
    assert len(batches) == 3 + (10 - 1) + (4 - 1) + 7  # the checks again, what was left of the pass, and calibration


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
        "places_of_fit": lambda: folder.load(run, module),
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
