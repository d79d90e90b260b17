"""What a checkpoint says of the run that wrote it, and where that run's folder may be now."""

from __future__ import annotations

import re
import uuid
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bmoe_lightning.methods.fit_index import stored_fit_id, unreadable
from bmoe_lightning.methods.training_data import PassFiles
from bmoe_lightning.trainer.folders import belongs_to, beside_checkpoint
from bmoe_lightning.trainer.snapshot_files import taken_over


@dataclass(frozen=True)
class EarlierRun:
    """The run that wrote a checkpoint.

    Attributes:
        folder: Output folder of that run.
        fit_id: Id of its fit; empty if unknown.
        snapshots: File names of its snapshots, latest last.
    """

    folder: Path
    fit_id: str
    snapshots: tuple[str, ...]

    @classmethod
    def of_state(cls, state: object) -> EarlierRun | None:
        """The run of a callback's state; what is no id is ignored, since file names contain it.

        Returns:
            The run; None if the state names no folder.

        Raises:
            ValueError: If the state is damaged.
        """
        if not isinstance(state, Mapping):
            raise _damaged(state)
        folder, snapshots = state.get("folder"), state.get("snapshots", [])
        if not folder:
            return None
        if not isinstance(folder, str) or "\0" in folder or not isinstance(snapshots, list | tuple):
            raise _damaged(state)
        fit_id = str(state.get("fit", ""))
        known = fit_id if re.fullmatch(r"[0-9a-f]{32}", fit_id) else ""
        return cls(Path(folder), known, tuple(str(name) for name in snapshots))

    @staticmethod
    def state(run: EarlierRun | None) -> dict[str, Any]:
        """The state of a callback from which `of_state` reads a run, or none."""
        if run is None:
            return {"folder": None, "fit": "", "snapshots": []}
        return {"folder": str(run.folder), "fit": run.fit_id, "snapshots": list(run.snapshots)}

    def id_of_next(self, places: Iterable[Path]) -> str:
        """Id of the fit of a run that resumes this one: the same, unless this one has finished.

        Args:
            places: Folders that may have its fit, which is not written over.
        """
        finished = bool(self.fit_id) and any(stored_fit_id(place) == self.fit_id for place in places)
        return uuid.uuid4().hex if finished or not self.fit_id else self.fit_id

    def take_over(self, home: Path, target: Path, target_id: str, num_snapshots: int, left: int | None) -> list[Path]:
        """Copy the snapshots of this run to the output folder of the run that resumes or completes it.

        Args:
            home: Output folder of this run, which may have been moved.
            target: Output folder of the other one, which may be the same.
            target_id: Id of the fit of the other one.
            num_snapshots: Number of snapshots that methods use.
            left: Number of epochs that are still trained; None if unknown.

        Returns:
            The snapshots, latest last.

        Raises:
            ValueError: If some are missing that methods will use.

        Warns:
            UserWarning: If some are missing that methods may not need.
        """
        found, missing = taken_over(home, self.snapshots, self.fit_id, target, target_id)
        used = self.snapshots[-max(0, num_snapshots - (left or 0)) :] if num_snapshots > (left or 0) else ()
        lost = [name for name in used if name in missing]
        why = f" ({error.strerror or error})" if (error := unreadable(home)) is not None else ""
        if lost and left is not None:
            raise ValueError(
                f"the checkpoint names {len(lost)} snapshots that {home} does not have{why}, {lost[0]!r} for one, and "
                f"methods use the last {num_snapshots}. Leave the folder of the run beside its checkpoints, lower "
                "num_snapshots, or remove these methods."
            )
        if missing and num_snapshots:
            warnings.warn(
                f"the checkpoint names {len(missing)} snapshots that {home} does not have{why}, {missing[0]!r} for "
                "one; methods that need snapshots use only the later ones",
                stacklevel=2,
            )
        return found

    def warn_of_pass(self, folder: Path) -> None:
        """Warn if a curvature pass of this run was killed in another folder than the one that a fit is written to.

        Args:
            folder: The folder that it is written to.

        Warns:
            UserWarning: With the folder that the pass can be resumed in.
        """
        if self.folder != folder and pass_files(self.folder, self.fit_id):
            warnings.warn(
                f"the run of the checkpoint has a killed curvature pass in {self.folder}, and this one starts from "
                f"the beginning in {folder}; pass dirpath={str(self.folder)!r} to resume it",
                stacklevel=2,
            )


def possible_homes(earlier: EarlierRun | None, checkpoint: Path | None, name: str = "") -> list[Path]:
    """Folders that may be the output folder of a checkpoint's run, the likeliest first.

    Args:
        earlier: What the checkpoint says of its run, if anything.
        checkpoint: Path of the checkpoint, if known.
        name: Name of the callback, a subfolder.
    """
    folder = None if earlier is None else earlier.folder
    found = [] if folder is None else [folder]
    if checkpoint is not None:
        found += beside_checkpoint(checkpoint, folder, name)
    return sorted(found, key=lambda path: earlier is None or not belongs_to(path, earlier.fit_id))


def pass_files(folder: Path, fit_id: str) -> set[Path]:
    """The `checkpoint` paths of a fit's curvature passes that have left files in a folder."""
    stem = re.escape(PassFiles(folder, 1, fit_id).stem)
    name = re.compile(rf"({stem}[0-9a-f]+)(-rank\d+of\d+)?\.safetensors(\..*)?")
    try:
        found = [name.fullmatch(path.name.removeprefix(".")) for path in folder.glob("*curvature_state-*")]
    except OSError:
        return set()
    return {folder / f"{match[1]}.safetensors" for match in found if match is not None} if fit_id else set()


def has_stored_sums(folder: Path) -> bool:
    """Whether a curvature pass of any fit was stopped in a folder and can be resumed."""
    return any(folder.glob("curvature_state-*.safetensors"))


def _damaged(state: object) -> ValueError:
    return ValueError(
        f"the checkpoint's state of BayesianMoECallback is damaged ({state!r:.80}); load another checkpoint of the run"
    )
