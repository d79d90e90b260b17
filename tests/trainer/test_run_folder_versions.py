"""Which folder each of several runs gets, and how a later process finds its fit among theirs."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from run_folder_cases import Dies, Killed, folder_of
from toy import ToyModule, loader, test_loader, trainer

from bmoe_lightning import BayesianMoECallback
from bmoe_lightning.laplace.posterior import WeightMismatchError
from bmoe_lightning.methods import CheckpointEnsemble
from bmoe_lightning.methods.storage import load_fit
from bmoe_lightning.trainer.snapshot_files import epoch_of


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
