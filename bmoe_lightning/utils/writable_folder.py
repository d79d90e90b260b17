"""Folders that files are going to be written to, checked before there is anything to write."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from bmoe_lightning.utils.messages import shown_path


def make_writable(folder: Path, what: str, remedy: str, *, dry: bool = False) -> None:
    """Create a folder unless it is there, and check that files can be written to it.

    Args:
        folder: The folder.
        what: What is going to be written to it, for the message.
        remedy: What to do otherwise, for the message.
        dry: Whether a missing folder is not created; the nearest folder above it is checked.

    Raises:
        OSError: If it is not writable, or no folder can have this path; the message says why.
    """
    place = folder
    try:
        place = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
        # Permissions do not tell of a full disk, a quota or a file system that is read-only.
        with tempfile.NamedTemporaryFile(dir=place, prefix=".bayesian-moe-") as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
        if not dry:
            folder.mkdir(parents=True, exist_ok=True)
            os.scandir(folder).close()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise OSError(
            f"{what} cannot be written to {shown_path(folder)}: {shown_path(place)} is not a writable folder "
            f"({reason}); {remedy}"
        ) from error
