"""Folders that are written under a temporary name and renamed when they are complete."""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from bmoe_lightning.utils.folder_lock import FolderInUseError, locked_folder

UNFINISHED = ".unfinished-"
"""Prefix of folders that are being written."""


class FolderFilledError(OSError):
    """Another process has filled the target folder in the meantime; that one stays."""


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside `folder`, and rename it to `folder` if the context ends without an error.

    Args:
        folder: Target folder, missing or empty; its parent is created.

    Raises:
        FolderFilledError: If another process has filled `folder` in the meantime.
        OSError: If it cannot be written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(_prefix(folder) + uuid.uuid4().hex)
    unfinished.mkdir()
    try:
        with locked_folder(unfinished):
            yield unfinished
            # Libraries create some files for their owner alone; all are as readable as the folder.
            mode = unfinished.stat().st_mode & 0o666
            for path in unfinished.rglob("*"):
                if path.is_file():
                    path.chmod(mode)
                    with path.open("rb+") as written:
                        os.fsync(written.fileno())
            try:
                unfinished.replace(folder)
            except OSError as error:
                if not folder.is_dir():
                    raise
                raise FolderFilledError(f"another process has written {folder} in the meantime") from error
    except SafetensorError as error:  # what libraries that write models raise on a full disk
        raise OSError(f"could not write {folder}: {error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def remove_unfinished(folder: Path) -> None:
    """Remove the folders in which killed processes have written the content of a folder.

    Args:
        folder: Target folder of `new_folder`, whose parent exists. What running processes write for it stays.

    Raises:
        OSError: If the parent cannot be read, or a folder cannot be removed.
    """
    # In full: with `model` there may be one of `model-large`.
    name = re.compile(rf"{re.escape(_prefix(folder))}[0-9a-f]{{32}}")
    for path in [path for path in folder.parent.iterdir() if name.fullmatch(path.name) and path.is_dir()]:
        with suppress(FolderInUseError), locked_folder(path):
            shutil.rmtree(path)


def _prefix(folder: Path) -> str:
    return f"{UNFINISHED}{folder.name}-"
