"""Advisory locks on folders, so that two processes do not write into one at the same time.

A lock is on the folder itself: it leaves no file, and ends with the process, however that ends.
"""

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


class FolderLock:
    """A lock on one folder at a time; several locks of one process on the same folder are all of this process.

    A copy of a locked one (by pickling) is not locked.
    """

    def __init__(self) -> None:
        self._descriptor: int | None = None
        self._process = os.getpid()

    def acquire(self, folder: Path) -> bool:
        """Lock a folder, and release the one that was locked before.

        Args:
            folder: An existing folder.

        Returns:
            Whether it is locked; False where the file system has no locks for folders.

        Raises:
            FolderInUseError: If another process has locked it.
        """
        self.release()
        if fcntl is None:
            return False
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            # Through one that this process has: locks of different descriptors exclude each other.
            shared = _known(descriptor)
            if shared is None:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:
                os.dup2(shared, descriptor, inheritable=False)
        except BlockingIOError:
            os.close(descriptor)
            raise FolderInUseError(f"another process is running in {folder}; wait for its end, or stop it") from None
        except OSError:  # some network file systems lock no folders
            os.close(descriptor)
            return False
        self._descriptor, self._process = descriptor, os.getpid()
        _descriptors.add(descriptor)
        return True

    def release(self) -> None:
        """Release the folder, unless another lock of this process has it too."""
        if self._descriptor is None:
            return
        descriptor, self._descriptor = self._descriptor, None
        _descriptors.discard(descriptor)
        if fcntl is not None and self._process == os.getpid() and _known(descriptor) is None:
            # A forked worker may live longer, with a copy of the descriptor.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)

    def __del__(self) -> None:
        self.release()

    def __getstate__(self) -> dict[str, int | None]:
        return {"_descriptor": None, "_process": self._process}

    def __deepcopy__(self, memo: object) -> FolderLock:
        return FolderLock()


_descriptors: set[int] = set()


def _known(descriptor: int) -> int | None:
    """A locked descriptor of this process for the same folder."""
    wanted = os.fstat(descriptor)
    for other in _descriptors:
        found = os.fstat(other)
        if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
            return other
    return None


@contextmanager
def locked_folder(folder: Path) -> Iterator[bool]:
    """Lock a folder within a context.

    Args:
        folder: An existing folder.

    Yields:
        Whether the folder is locked; False where the file system has no locks for folders.

    Raises:
        FolderInUseError: If another process has locked it.
    """
    lock = FolderLock()
    try:
        yield lock.acquire(folder)
    finally:
        lock.release()
