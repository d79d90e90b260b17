"""An advisory lock on a folder, so that two processes do not run in it at the same time."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

fcntl = None if sys.platform == "win32" else importlib.import_module("fcntl")


class FolderInUseError(RuntimeError):
    """Another process has locked the folder."""


@contextmanager
def locked_folder(folder: Path) -> Iterator[bool]:
    """Lock a folder within a context. The lock is on the folder itself: it leaves no file, and ends with the process.

    Args:
        folder: An existing folder.

    Yields:
        Whether the folder is locked; False where the file system has no locks for folders.

    Raises:
        FolderInUseError: If another process has locked it.
    """
    if fcntl is None:
        yield False
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        locked = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FolderInUseError(f"another process is running in {folder}; wait for its end, or stop it") from None
        except OSError:  # some network file systems lock no folders
            locked = False
        yield locked
    finally:
        os.close(descriptor)
