"""What a run takes over from the run of a checkpoint, and leaves: after kills, in its folder or another."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from run_folder_cases import Dies, Killed, folder_of
from toy import ToyModule, loader, trainer

from bmoe_lightning import BayesianMoECallback
from bmoe_lightning.laplace.posterior import WeightMismatchError
from bmoe_lightning.methods import CheckpointEnsemble, save_snapshot
from bmoe_lightning.methods.storage import load_fit
from bmoe_lightning.trainer.snapshot_files import epoch_of


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


PASS = {"methods": ("map", "laplace_lpo"), "curvature_checkpoint_every": 1}


class TestKilledFits:
    """A second run in a folder with a fit, killed in its curvature pass."""

    def train(self, root, seed, kill=False, **options):
        passes = []

        def class_logits(module, batch):
            passes.append(1)
            if kill and len(passes) == 6:  # three checks, two runs of the first batch
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
