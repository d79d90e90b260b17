"""The fine-tuned weights of a run on disk, and the callbacks that save and load them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import lightning as L

from bmoe_lightning.base_finetuner import Finetuner
from bmoe_lightning.experts.fsdp import gathered
from bmoe_lightning.methods import apply_snapshot, save_snapshot
from bmoe_lightning.methods.snapshots import snapshot_info, verify_snapshot
from bmoe_lightning.trainer.signals import check_sigterm, set_exit_status


def has_weights(path: Path, stage: str) -> bool:
    """Whether a file has the weights of a fine-tuning run.

    Args:
        path: Path of the file.
        stage: Digest of everything that determines the weights.

    Warns:
        UserWarning: If the file is damaged, or from a run with other settings; it is then treated as missing.
    """
    if not path.is_file():
        return False
    try:
        found = _stage_of(path)
    except ValueError as error:
        warnings.warn(f"{error} The weights are trained again", stacklevel=2)
        return False
    if found != stage:
        warnings.warn(f"{path} is from a run with other settings. The weights are trained again", stacklevel=2)
    return found == stage


def keeps_weights(path: Path, stage: str) -> bool:
    """Whether a file has the weights of a fine-tuning run, as `has_weights`, where nothing is trained if it has not.

    Args:
        path: Path of the file.
        stage: Digest of everything that determines the weights.
    """
    try:
        return _stage_of(path) == stage
    except (FileNotFoundError, ValueError):
        return False


def _stage_of(path: Path) -> str:
    """The stage of which a file has the weights; raises `ValueError` if it is damaged."""
    verify_snapshot(path)
    return snapshot_info(path).fit


class SaveTrained(L.Callback):
    """Writes the trained weights when training ends; first in the list, so that they are saved if the fit fails."""

    def __init__(self, path: Path, stage: str) -> None:
        self._path = path
        self._stage = stage

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the weights; only rank zero does."""
        assert isinstance(pl_module, Finetuner)
        weights = gathered(pl_module.trained_parameters(), keep=trainer.is_global_zero)
        if trainer.is_global_zero:
            save_snapshot(self._path, weights, fit=self._stage)
        trainer.strategy.barrier()


class LoadTrained(L.Callback):
    """Loads the trained weights before a fit without training steps, and before a test.

    Args:
        path: File of the weights.
        before: Called with the module before they are loaded.
    """

    def __init__(self, path: Path, before: Callable[[L.LightningModule], None] | None = None) -> None:
        self._path = path
        self._before = before

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
        """Load the weights."""
        if self._before is not None:
            self._before(pl_module)
        apply_snapshot(pl_module, self._path)

    on_test_start = on_fit_start


class StopAtSignal(L.Callback):
    """Sets the exit status of a trainer that SIGTERM stops, and stops after a signal that its loops did not see."""

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:  # noqa: ARG002
        """Set the exit status."""
        set_exit_status(exception)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:  # noqa: ARG002
        """Stop if the trainer has received SIGTERM."""
        check_sigterm(trainer)
