"""What a checkpoint says of the run that wrote it, and where that run's folder may be now."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bmoe_lightning.methods.training_data import PassFiles
from bmoe_lightning.trainer.folders import belongs_to, beside_checkpoint


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


def _damaged(state: object) -> ValueError:
    return ValueError(
        f"the checkpoint's state of BayesianMoECallback is damaged ({state!r:.80}); load another checkpoint of the run"
    )
