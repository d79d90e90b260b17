"""Output folders: the default one of a run, its versions, and which run is training into it."""

from __future__ import annotations

import itertools
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import lightning as L

from bmoe_lightning.methods.storage import has_fit, stored_fit_id
from bmoe_lightning.trainer.snapshot_files import has_snapshots
from bmoe_lightning.utils.atomic_io import write_text

FOLDER = "bayesian_moe"
_CLAIM = ".training"


def default_folder(trainer: L.Trainer, name: str = "") -> Path:
    """The last version with a fit of the run's default output folder, or its first version.

    Args:
        trainer: The trainer.
        name: Name of the callback, a subfolder.
    """
    return _latest_version(_log_folder(trainer) / FOLDER / name)


def beside_checkpoint(checkpoint: Path, earlier: Path | None, name: str = "") -> list[Path]:
    """Folders near a checkpoint that may be the output folder of its run, which was moved or copied as a whole.

    Args:
        checkpoint: Path of the checkpoint.
        earlier: Output folder that the checkpoint names, if any.
        name: Name of the callback, a subfolder.
    """
    tails = [Path(*earlier.parts[-2 if name else -1 :])] if earlier is not None else []
    tails.append(Path(FOLDER, name))
    bases = (checkpoint.parent, checkpoint.parent.parent)
    found = [version for base in bases for tail in tails for version in _existing_versions(base / tail)]
    return list(dict.fromkeys([*found, checkpoint.parent / name]))


def belongs_to(folder: Path, fit_id: str) -> bool:
    """Whether a folder has files of a fit: its index, its snapshots, or the mark of its training."""
    return bool(fit_id) and (fit_id in (stored_fit_id(folder), training_id(folder)) or has_snapshots(folder, fit_id))


def claimed_version(folder: Path, fit_id: str) -> Path:
    """The first version of a default folder that no other run uses, marked as used by this one.

    Args:
        folder: Default folder, or a version of it.
        fit_id: Id of this run's fit.

    Raises:
        OSError: If it cannot be written to.
    """
    first = folder.with_name(re.sub(r"-v\d+$", "", folder.name))
    for version in dict.fromkeys([folder, *_existing_versions(first)]):
        if belongs_to(version, fit_id):
            mark_training(version, fit_id)
            return version
    for version in itertools.chain([folder], _versions(first)):
        if stored_fit_id(version) is None and training_id(version) is None and _create_mark(version, fit_id):
            return version
    raise AssertionError("there is always another version")


def mark_training(folder: Path, fit_id: str) -> None:
    """Record that a run is training into a folder, in place of any other run."""
    _check_parents(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / _CLAIM, fit_id)


def unmark_training(folder: Path, fit_id: str) -> None:
    """Remove the mark of a run whose fit is written."""
    if training_id(folder) == fit_id:
        (folder / _CLAIM).unlink(missing_ok=True)


def training_id(folder: Path) -> str | None:
    """The id of the fit whose run is training into a folder, or was killed; empty if its mark is damaged."""
    try:
        found = (folder / _CLAIM).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError):
        return ""
    return found if re.fullmatch(r"[0-9a-f]{32}", found) else ""


def _create_mark(folder: Path, fit_id: str) -> bool:
    """Mark a folder; False if another process was faster."""
    _check_parents(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with (folder / _CLAIM).open("x", encoding="utf-8") as file:
            file.write(fit_id)
    except FileExistsError:
        return False
    return True


def _check_parents(folder: Path) -> None:
    """Check that a folder is writable, before there is anything to write."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        # Permissions do not tell of a full disk, a quota or a file system that is read-only.
        with tempfile.NamedTemporaryFile(dir=there, prefix=".bayesian-moe-") as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(
            f"the fit cannot be written to {folder}: {there} is not a writable folder ({error.strerror}); pass another "
            "dirpath="
        ) from error


def _log_folder(trainer: L.Trainer) -> Path:
    """The folder of a run: `save_dir/name/version` of the first logger, as for Lightning's `ModelCheckpoint`."""
    if not trainer.loggers:
        return Path(trainer.default_root_dir)
    logger = trainer.loggers[0]
    save_dir, name, version = logger.save_dir, logger.name, logger.version
    folder = trainer.default_root_dir if save_dir is None else save_dir
    return Path(folder, str(name), version if isinstance(version, str) else f"version_{version}")


def _versions(folder: Path) -> Iterator[Path]:
    """A folder, then its versions `-v1`, `-v2`, ..., as in the file names of `ModelCheckpoint`."""
    yield folder
    for number in itertools.count(1):
        yield folder.with_name(f"{folder.name}-v{number}")


def _existing_versions(folder: Path) -> list[Path]:
    return list(itertools.takewhile(Path.is_dir, _versions(folder)))


def _latest_version(folder: Path) -> Path:
    """The last version of a folder with a fit; the folder itself if there is none."""
    with_fit = [version for version in _existing_versions(folder) if has_fit(version)]
    return with_fit[-1] if with_fit else folder
