"""Checkpoints that name folders which were moved, cannot be read, or never were."""

from __future__ import annotations

import shutil

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from run_folder_cases import folder_of
from toy import ToyModule, loader, test_loader, trainer
from unprivileged import unprivileged_folder

from bmoe_lightning import BayesianMoECallback
from bmoe_lightning.laplace.posterior import WeightMismatchError
from bmoe_lightning.methods import CheckpointEnsemble


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
