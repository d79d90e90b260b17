"""The files of a run's snapshots: names, and those that a resumed or completed run takes over."""

from __future__ import annotations

import re
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path

from bmoe_lightning.methods.fit_index import SNAPSHOT_FOLDER
from bmoe_lightning.methods.snapshots import read_snapshot, save_snapshot, snapshot_info
from bmoe_lightning.utils.file_header import is_file

_NAME = re.compile(r"(?P<fit>[0-9a-f]{8})-epoch-(?P<epoch>\d{4,})(-[0-9a-f]{8}|-v\d+)?\.safetensors")


def new_snapshot(folder: Path, fit_id: str, epoch: int) -> Path:
    """A path in the snapshot folder that no snapshot has or had.

    A checkpoint names its snapshots. When an epoch is trained again after they were removed, the new one must not be
    taken for them, so names have a random part.

    Args:
        folder: Output folder of the run.
        fit_id: Id of the run's fit.
        epoch: Epoch after which the snapshot is written.
    """
    return folder / SNAPSHOT_FOLDER / f"{fit_id[:8]}-epoch-{epoch:04d}-{uuid.uuid4().hex[:8]}.safetensors"


def epoch_of(path: Path) -> int:
    """The epoch in a snapshot's file name; -1 for any other name."""
    found = _NAME.fullmatch(path.name)
    return -1 if found is None else int(found["epoch"])


def has_snapshots(folder: Path, fit_id: str) -> bool:
    """Whether an output folder has a snapshot of a fit."""
    return bool(fit_id) and any((folder / SNAPSHOT_FOLDER).glob(f"{fit_id[:8]}-epoch-*.safetensors"))


def latest_snapshots(folder: Path, fit_id: str | None = None) -> list[Path]:
    """The snapshots of the training run that wrote the latest one, one for each epoch, in the order of epochs.

    Args:
        folder: Output folder of the run.
        fit_id: Id of the run's fit, if known.
    """
    found = [path for path in (folder / SNAPSHOT_FOLDER).glob("*.safetensors") if epoch_of(path) >= 0]
    if fit_id is not None:
        found = [path for path in found if path.name[:8] == fit_id[:8]]
    found.sort(key=lambda path: path.stat().st_mtime_ns)
    if not found:
        return []
    # Later epochs than the latest file's are of an attempt that was given up.
    last = found[-1]
    by_epoch = {
        epoch_of(path): path for path in found if path.name[:8] == last.name[:8] and epoch_of(path) <= epoch_of(last)
    }
    return [by_epoch[epoch] for epoch in sorted(by_epoch)]


def taken_over(
    folder: Path, names: Sequence[str], fit_id: str, target: Path, target_id: str
) -> tuple[list[Path], list[str]]:
    """Copy the snapshots of a run to the output folder of the run that resumes it.

    Args:
        folder: Output folder of the earlier run.
        names: File names of its snapshots, from a checkpoint.
        fit_id: Id of its fit.
        target: Output folder of the resumed run, which may be the same.
        target_id: Id of the fit of the resumed run, which may be the same.

    Returns:
        The snapshots, and the names of those that are missing or belong to another fit.
    """
    found, missing = [], []
    for name in names:
        path = folder / SNAPSHOT_FOLDER / name
        if _NAME.fullmatch(name) and is_file(path) and snapshot_info(path).fit == fit_id:
            found.append(copied(path, target) if target_id == fit_id else _with_id(path, target, target_id))
        else:
            missing.append(name)
    return found, missing


def _with_id(path: Path, target: Path, fit_id: str) -> Path:
    copy = new_snapshot(target, fit_id, epoch_of(path))
    save_snapshot(copy, read_snapshot(path), fit=fit_id, weights=snapshot_info(path).weights)
    return copy


def copied(path: Path, target: Path) -> Path:
    """Copy a snapshot to the snapshot folder of an output folder, unless it is there already; returns its path."""
    copy = target / SNAPSHOT_FOLDER / path.name
    if copy == path:
        return path
    info = snapshot_info(path)
    if copy.exists() and snapshot_info(copy).digest != info.digest:
        copy = new_snapshot(target, info.fit, epoch_of(path))
    if not copy.exists():
        copy.parent.mkdir(parents=True, exist_ok=True)
        partial = copy.with_name(f".{copy.name}.{uuid.uuid4().hex}.tmp")
        try:
            shutil.copyfile(path, partial)
            partial.replace(copy)
        finally:
            partial.unlink(missing_ok=True)
    return copy
