"""Output folders: the default one of a run, its versions, those of other runs, and which run is training into one."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import lightning as L

from bmoe_lightning.methods.fit_index import INDEX_FILE, has_fit, stored_fit_id, unreadable
from bmoe_lightning.trainer.snapshot_files import has_snapshots
from bmoe_lightning.utils.atomic_io import write_text
from bmoe_lightning.utils.folder_lock import FolderInUseError, FolderLock
from bmoe_lightning.utils.writable_folder import make_writable

FOLDER = "bayesian_moe"
_CLAIM = ".training"
_MARK = re.compile(r"(?P<fit>[0-9a-f]{32})(?: (?P<weights>[0-9a-f]{64}))?")
_VERSION = re.compile(r"-v\d+$")
_NUMBERED = re.compile(r"version_\d+")


def default_folder(trainer: L.Trainer, name: str = "") -> Path:
    """The default output folder of a run, of which later runs use versions `-v1`, `-v2`, ...

    Args:
        trainer: The trainer.
        name: Name of the callback, a subfolder.
    """
    return _log_folder(trainer) / FOLDER / name


def check_name(name: str) -> None:
    """Check the name of a callback, which is that of a subfolder.

    Raises:
        ValueError: If it has other characters than a folder may have, or ends like a version.
    """
    if name and not re.fullmatch(r"[\w.-]*\w", name):
        raise ValueError(
            f"name becomes a folder and a part of logged keys; use letters, digits, '.', '_' and '-', got {name!r}"
        )
    if _VERSION.search(name):
        raise ValueError(f"name {name!r} ends like the version of another run's folder; leave out the end '-v...'")


def is_version(folder: Path, default: Path) -> bool:
    """Whether a folder is a default folder, or a version of it."""
    return folder.parent == default.parent and _first_version(folder) == _first_version(default)


def versions_with_fit(folder: Path) -> list[Path]:
    """The versions of a default folder that have a fit or cannot be read, the latest first."""
    return [path for path in reversed(_existing_versions(_first_version(folder))) if has_fit(path) or unreadable(path)]


def folders_of_other_runs(trainer: L.Trainer, name: str = "") -> list[Path]:
    """The default folders, with a fit, of the other runs of a trainer's logger, the latest fit first.

    Beside `version_3` these are other numbers; beside the id of a run, as W&B and MLflow have them, all other folders.

    Args:
        trainer: The trainer.
        name: Name of the callback, a subfolder.
    """
    if not trainer.loggers:
        return []
    log_folder = _log_folder(trainer)
    found = []
    with suppress(OSError, ValueError):
        for run in sorted(log_folder.parent.iterdir()):
            is_like = not _NUMBERED.fullmatch(log_folder.name) or _NUMBERED.fullmatch(run.name)
            if run.name != log_folder.name and is_like:
                found += versions_with_fit(run / FOLDER / name)
    return sorted(found, key=_time_of_fit, reverse=True)


def beside_checkpoint(checkpoint: Path, earlier: Path | None, name: str = "") -> list[Path]:
    """Folders near a checkpoint that may be the output folder of its run, which was moved or copied as a whole.

    Args:
        checkpoint: Path of the checkpoint.
        earlier: Output folder that the checkpoint names, if any.
        name: Name of the callback, a subfolder.
    """
    tail = [] if earlier is None else list(earlier.parts[-2 if name else -1 :])
    # A path in a checkpoint may be anything, and it is searched for within these folders only.
    tails = [Path(*tail)] if tail and not {"..", earlier and earlier.anchor} & set(tail) else []
    tails.append(Path(FOLDER, name))
    bases = (checkpoint.parent, checkpoint.parent.parent)
    found = [version for base in bases for tail in tails for version in _existing_versions(base / tail)]
    return list(dict.fromkeys([*found, checkpoint.parent / name]))


def belongs_to(folder: Path, fit_id: str) -> bool:
    """Whether a folder has files of a fit: its index, its snapshots, or the mark of its training."""
    try:
        known = (stored_fit_id(folder), training_id(folder))
        return bool(fit_id) and (fit_id in known or has_snapshots(folder, fit_id))
    except (OSError, ValueError):  # a name that is too long, say
        return False


def claimed_version(folder: Path, fit_id: str, lock: FolderLock) -> Path:
    """The first version of a default folder that no other run uses, locked and marked as used by this one.

    Args:
        folder: Default folder, or a version of it.
        fit_id: Id of this run's fit.
        lock: Lock for the folder.

    Raises:
        OSError: If it cannot be written to.
    """
    first = _first_version(folder)
    for version in dict.fromkeys([folder, *_existing_versions(first)]):
        # Another process may resume the same checkpoint at this moment.
        if belongs_to(version, fit_id) and _is_locked(version, lock):
            _mark(version, fit_id)
            return version
    for version in _versions(first):
        if _is_free(version) and _create_mark(version, fit_id) and _is_locked(version, lock):
            if stored_fit_id(version) is None:
                return version
            # Another process has written its fit, and removed its mark, in between.
            unmark_training(version, fit_id)
    raise AssertionError("there is always another version")


def killed_versions(folder: Path, lock: FolderLock) -> Iterator[Path]:
    """The versions of a default folder whose runs were killed before they had a fit, the latest first.

    Each is locked until the next one is asked for, and the last one afterwards.
    """
    for version in reversed(_existing_versions(_first_version(folder))):
        if training_id(version) and not has_fit(version) and _is_locked(version, lock):
            yield version


def claim(folder: Path, fit_id: str, lock: FolderLock) -> None:
    """Lock a folder, and record that a run is training into it, in place of any other run that has ended.

    Raises:
        FolderInUseError: If another process is training into it.
        OSError: If it cannot be written to.
    """
    _make_folder(folder)
    try:
        lock.acquire(folder)
    except FolderInUseError as error:
        raise FolderInUseError(f"{error}, or pass another dirpath=") from None
    _mark(folder, fit_id)


def mark_weights(folder: Path, fit_id: str, weights: str) -> None:
    """Record in the mark of a run which weights its methods are being fitted to.

    Args:
        folder: Folder that the run has claimed.
        fit_id: Id of its fit.
        weights: Their fingerprint; empty while the run is training.
    """
    write_text(folder / _CLAIM, f"{fit_id} {weights}".strip())


def _mark(folder: Path, fit_id: str) -> None:
    _make_folder(folder)
    if training_id(folder) != fit_id:
        write_text(folder / _CLAIM, fit_id)


def _is_locked(folder: Path, lock: FolderLock) -> bool:
    """Lock a folder; False if another process has locked it."""
    try:
        lock.acquire(folder)
    except (FolderInUseError, OSError):
        return False
    return True


def unmark_training(folder: Path, fit_id: str) -> None:
    """Remove the mark of a run whose fit is written."""
    if training_id(folder) == fit_id:
        (folder / _CLAIM).unlink(missing_ok=True)


def training_id(folder: Path) -> str | None:
    """The id of the fit whose run is training into a folder, or was killed; empty if its mark is damaged."""
    try:
        found = _MARK.fullmatch((folder / _CLAIM).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError):
        return ""
    return "" if found is None else found["fit"]


def marked_weights(folder: Path) -> str:
    """The fingerprint of the weights that a killed run was fitting its methods to; empty if unknown."""
    try:
        found = _MARK.fullmatch((folder / _CLAIM).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    return "" if found is None else found["weights"] or ""


def _is_free(folder: Path) -> bool:
    """Whether a folder has neither a fit nor a mark, as far as this user can see."""
    return unreadable(folder) is None and training_id(folder) is None and stored_fit_id(folder) is None


def _create_mark(folder: Path, fit_id: str) -> bool:
    """Mark a folder; False if another process was faster."""
    _make_folder(folder)
    try:
        with (folder / _CLAIM).open("x", encoding="utf-8") as file:
            file.write(fit_id)
    except FileExistsError:
        return False
    return True


def _make_folder(folder: Path) -> None:
    make_writable(folder, "the fit", "pass another dirpath=")


def _log_folder(trainer: L.Trainer) -> Path:
    """The folder of a run: `save_dir/name/version` of the first logger, as for Lightning's `ModelCheckpoint`."""
    if not trainer.loggers:
        return Path(trainer.default_root_dir).absolute()
    logger = trainer.loggers[0]
    save_dir, name, version = logger.save_dir, logger.name, logger.version
    folder = trainer.default_root_dir if save_dir is None else save_dir
    return Path(folder, str(name), version if isinstance(version, str) else f"version_{version}").absolute()


def _first_version(folder: Path) -> Path:
    return folder.parent / _VERSION.sub("", folder.name)


def _versions(folder: Path) -> Iterator[Path]:
    """A folder, then its versions `-v1`, `-v2`, ..., as in the file names of `ModelCheckpoint`."""
    yield folder
    for number in itertools.count(1):
        yield folder.parent / f"{folder.name}-v{number}"


def _existing_versions(folder: Path) -> list[Path]:
    return list(itertools.takewhile(_exists, _versions(folder)))


def _exists(folder: Path) -> bool:
    """Whether something is at a path, as far as this user can see."""
    try:
        return os.path.lexists(folder)
    except ValueError:
        return False


def _time_of_fit(folder: Path) -> float:
    try:
        return (folder / INDEX_FILE).stat().st_mtime
    except OSError:
        return 0.0
