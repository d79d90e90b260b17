"""The best weights are in the module for a while, and their file runs no code."""

from __future__ import annotations

import pickle
import types
from pathlib import Path

import lightning as L
import pytest
import torch
from fake_trainer import FakeTrainer
from lightning.pytorch.callbacks import ModelCheckpoint
from plain_runs import Plain, loader
from toy import trainer
from unprivileged import unprivileged_folder

from bmoe_lightning.trainer.checkpoints import best_weights
from bmoe_lightning.utils.checkpoint_io import UnsafeCheckpointError
from bmoe_lightning.utils.file_header import DamagedFileError


class Harmful:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


class TestBestWeights:
    def fake(self, path):
        return FakeTrainer(checkpoint_callback=types.SimpleNamespace(best_model_path=str(path)))

    def checkpoint(self, path, **state):
        torch.save({"state_dict": {name: torch.tensor(value) for name, value in state.items()}}, path)
        return self.fake(path)

    @pytest.mark.parametrize("fails", [False, True])
    def test_are_there_for_a_while(self, tmp_path, fails):
        module = Plain()
        last = {name: value.clone() for name, value in module.state_dict().items()}
        parameters = list(module.parameters())
        state = {"layer.weight": [[3.0]], "layer.bias": [4.0], "steps": 5.0}
        run = self.checkpoint(tmp_path / "best.ckpt", **state)

        def use():
            with best_weights(run, module):
                assert {name: value.tolist() for name, value in module.state_dict().items()} == state
                if fails:
                    raise KeyError("in between")

        if fails:
            with pytest.raises(KeyError):
                use()
        else:
            use()
        for name, value in module.state_dict().items():
            assert torch.equal(value, last[name])
        assert all(one is other for one, other in zip(parameters, module.parameters(), strict=True))

    def test_a_checkpoint_of_a_part_changes_a_part(self, tmp_path):
        module = Plain()
        bias = module.layer.bias.clone()
        with best_weights(self.checkpoint(tmp_path / "best.ckpt", **{"layer.weight": [[3.0]]}), module):
            assert module.layer.weight.item() == 3
            assert torch.equal(module.layer.bias, bias)

    def test_a_checkpoint_that_does_not_fit_changes_nothing(self, tmp_path):
        module = Plain()
        last = {name: value.clone() for name, value in module.state_dict().items()}
        run = self.checkpoint(tmp_path / "best.ckpt", **{"layer.weight": [[3.0]], "layer.bias": [4.0, 5.0]})
        with pytest.raises(RuntimeError, match="size mismatch"), best_weights(run, module):
            pass
        for name, value in module.state_dict().items():
            assert torch.equal(value, last[name])

    @pytest.mark.parametrize("callback", [None, ModelCheckpoint()])
    def test_without_a_saved_checkpoint(self, callback):
        run = FakeTrainer(checkpoint_callback=callback)
        with pytest.raises(RuntimeError, match="saved no checkpoint"), best_weights(run, Plain()):
            pass

    def test_code_in_a_checkpoint_does_not_run(self, tmp_path):
        torch.save({"state_dict": {}, "callbacks": Harmful(tmp_path / "ran")}, tmp_path / "best.ckpt")
        said = r"best.ckpt contains objects of .*pathlib.Path.*add_safe_globals, or use fit_at='last'"
        with pytest.raises(UnsafeCheckpointError, match=said), best_weights(self.fake(tmp_path / "best.ckpt"), Plain()):
            pass
        assert not (tmp_path / "ran").exists()

    def test_hyperparameters_that_are_objects_are_named(self, tmp_path):
        torch.save({"state_dict": {}, "hyper_parameters": {"optimizer": torch.optim.SGD}}, tmp_path / "best.ckpt")
        run = self.fake(tmp_path / "best.ckpt")
        with pytest.raises(UnsafeCheckpointError, match=r"objects of torch.optim.sgd.SGD"), best_weights(run, Plain()):
            pass
        with torch.serialization.safe_globals([torch.optim.SGD]), best_weights(run, Plain()):
            pass

    def test_a_damaged_file_is_no_question_of_trust(self, tmp_path):
        (tmp_path / "best.ckpt").write_bytes(pickle.dumps({"a": 1}, 2)[:-3] + b"garbage")
        run = self.fake(tmp_path / "best.ckpt")
        with pytest.raises(DamagedFileError, match="is damaged"), best_weights(run, Plain()):
            pass

    @pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and then nothing", {"weights": 1}, [1], {"state_dict": [1]}])
    def test_what_is_no_checkpoint(self, tmp_path, content):
        path = tmp_path / "best.ckpt"
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with (
            pytest.raises(DamagedFileError, match=r"best.ckpt is damaged, or no"),
            best_weights(self.fake(path), Plain()),
        ):
            pass

    @pytest.mark.parametrize(
        ("path", "error", "said"),
        [
            ("missing.ckpt", FileNotFoundError, "no best checkpoint at"),
            (".", IsADirectoryError, "is a folder, not a best checkpoint"),
            ("file/best.ckpt", NotADirectoryError, "cannot be opened .Not a directory"),
            ("dangling", FileNotFoundError, "is a link to a file that does not exist"),
            ("x" * 5000, OSError, "File name too long"),
            ("a\0b", ValueError, r"a.x00b' cannot be the path"),
        ],
    )
    def test_a_path_that_no_checkpoint_has(self, tmp_path, path, error, said):
        (tmp_path / "file").write_text("")
        (tmp_path / "dangling").symlink_to(tmp_path / "gone")
        with pytest.raises(error, match=said), best_weights(self.fake(f"{tmp_path}/{path}"), Plain()):
            pass

    def test_a_file_that_cannot_be_read(self):
        with unprivileged_folder() as folder:
            run = self.checkpoint(folder / "best.ckpt")
            (folder / "best.ckpt").chmod(0)
            with pytest.raises(PermissionError, match=r"best.ckpt cannot be read .*Give this user permission"):
                best_weights(run, Plain()).__enter__()

    @pytest.mark.parametrize("path", [5, ["best.ckpt"], {"path": "x"}])
    def test_what_is_no_path(self, path):
        run = FakeTrainer(checkpoint_callback=types.SimpleNamespace(best_model_path=path))
        with pytest.raises(TypeError, match="as its best checkpoint; use fit_at='last'"):
            best_weights(run, Plain()).__enter__()

    def test_a_checkpoint_of_lightning_with_hyperparameters(self, tmp_path):
        class WithHyperparameters(Plain):
            def __init__(self, rate=0.5, sizes=(1, 2)):
                super().__init__()
                self.save_hyperparameters()

            def training_step(self, batch, batch_idx):
                loss = super().training_step(batch, batch_idx)
                self.log("loss", loss)
                return loss

        saving = ModelCheckpoint(tmp_path, monitor="loss", save_top_k=1)
        module = WithHyperparameters()
        run = trainer(tmp_path, [saving, L.pytorch.callbacks.EarlyStopping("loss")], enable_checkpointing=True)
        run.fit(module, loader())
        best = torch.load(saving.best_model_path, weights_only=True)["state_dict"]
        torch.nn.init.zeros_(module.layer.weight)
        with best_weights(run, module):
            assert torch.equal(module.layer.weight, best["layer.weight"])
        assert module.layer.weight.item() == 0
