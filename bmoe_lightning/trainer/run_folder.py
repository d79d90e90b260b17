"""The files of a callback: where a run writes, and what an earlier one has written there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L

from bmoe_lightning.curvature.checkpoint import remove_checkpoint
from bmoe_lightning.experts.fsdp import gathered, reshard
from bmoe_lightning.methods import save_snapshot
from bmoe_lightning.methods.options import FitSettings
from bmoe_lightning.methods.storage import CURVATURE_STATE_FILE, has_fitted, load_fitted
from bmoe_lightning.methods.workbench import Fitted
from bmoe_lightning.trainer.checks import is_trial


class RunFiles:
    """Which folder belongs to a run, and which snapshots are in it.

    Args:
        given: the folder that the user named, if any.
        settings: what is fitted; what was fitted with other settings is refused.

    Attributes:
        given: as above; of several processes, the first one's.
        folder: where the run writes; None writes nothing.
        snapshots: files of the checkpoint ensemble, the latest last.
    """

    def __init__(self, given: str | None, settings: FitSettings) -> None:
        self.given = Path(given) if given is not None else None
        self.folder = self.given
        self.snapshots: list[Path] = []
        self._settings = settings
        self._earlier: Path | None = None  # where the run of a loaded checkpoint wrote
        self._earlier_snapshots: list[Path] = []  # of the run that is being resumed

    def settle(self, trainer: L.Trainer, name: str) -> None:
        """Have all processes write into one folder: the given one, or one in the logger's. A collective."""
        log_dir = trainer.log_dir  # read on every rank: it may be a collective
        default = Path(log_dir or trainer.default_root_dir) / "bayesian_moe" / name
        # A path with the time in it is another one on each process.
        self.given, default = trainer.strategy.broadcast((self.given, default))
        self.folder = None if is_trial(trainer) else self.given or default

    def begin_training(self, trainer: L.Trainer) -> None:
        """Keep the snapshots of a run that is being resumed, and no sums of earlier weights. A collective."""
        remove_curvature_state(self.folder)
        found = [path for path in self._earlier_snapshots if path.is_file()]
        self.snapshots = trainer.strategy.broadcast(found)
        self._earlier_snapshots = []

    def keep_snapshot(self, trainer: L.Trainer, module: L.LightningModule, num_snapshots: int) -> None:
        """Write the trained weights of an epoch, and remove those of the earliest one too many. A collective."""
        if self.folder is None:
            return
        self.snapshots.append(self.folder / "snapshots" / f"epoch-{trainer.current_epoch:04d}.safetensors")
        surplus = self.snapshots[:-num_snapshots]
        del self.snapshots[:-num_snapshots]
        reshard(module)
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        kept = gathered(trained, keep=trainer.is_global_zero)
        if trainer.is_global_zero:
            save_snapshot(self.snapshots[-1], kept)
            for earlier in surplus:
                earlier.unlink(missing_ok=True)

    def load(self) -> Fitted | None:
        """Read what an earlier process wrote, its snapshots included; None if there is nothing.

        Raises:
            ValueError: if that was fitted with other settings, or is damaged.
            FileNotFoundError: if a part of it is missing.
        """
        for folder in (self.given, self._earlier, self.folder):
            if folder is not None and has_fitted(folder):
                fitted, snapshots = load_fitted(folder, offload=self._settings.offload_factors)
                differing = self._settings.fitting_differences(fitted.settings)
                if differing:
                    raise ValueError(
                        f"what was fitted in {folder} had other settings than this callback: {', '.join(differing)}. "
                        "Give the callback the same ones, or fit again"
                    )
                self.snapshots = snapshots
                return fitted
        return None

    def state_dict(self) -> dict[str, Any]:
        """Paths, for a checkpoint."""
        return {
            "folder": None if self.folder is None else str(self.folder),
            "snapshots": [str(path) for path in self.snapshots],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember where the run of a checkpoint wrote."""
        if state_dict.get("folder"):
            self._earlier = Path(state_dict["folder"])
        self._earlier_snapshots = [Path(path) for path in state_dict.get("snapshots", [])]


def remove_curvature_state(folder: Path | None) -> None:
    """Remove the sums of a curvature epoch that is over, or of weights that are no more."""
    if folder is not None:
        remove_checkpoint(folder / CURVATURE_STATE_FILE)
