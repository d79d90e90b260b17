"""Atomic writes: a reader sees either the old or the new content of a file, and a failed write leaves the old one.

Temporary files are named `.<target>.<host>-<process id>-<random>.tmp`, so that those of killed writers are recognised.
"""

from __future__ import annotations

import os
import platform
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_HOST = re.sub(r"[^A-Za-z0-9_]", "_", platform.node())[:64] or "host"
_TEMPORARY = re.compile(r"\.(?P<target>.+)\.(?:(?P<host>[A-Za-z0-9_]+)-(?P<pid>\d+)-)?(?P<random>[0-9a-f]+)\.tmp")
_ABANDONED = 3600.0  # seconds without a write


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """Yield a temporary file in the folder of `path`, and rename it to `path` if the context ends without an error.

    Temporary files of killed writers of `path` are removed first. A path must have one writer at a time: on several
    ranks, rank zero.

    Args:
        path: Target path, in an existing folder.

    Raises:
        OSError: If the file cannot be written or renamed.
    """
    remove_leftovers(path)
    temporary = path.with_name(f".{path.name}.{_HOST}-{os.getpid()}-{uuid.uuid4().hex}.tmp")
    try:
        temporary.touch(exist_ok=False)
        yield temporary
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(path: Path) -> None:
    """Remove the temporary files of processes that were killed while they wrote `path`.

    A file of a process that is running is not removed, nor one that a process of another machine wrote to within the
    last hour.

    Args:
        path: Target path that this process is not writing; it need not exist.
    """
    for file, found in _temporaries(path.parent):
        if found["target"] == path.name and not _is_in_use(file, found):
            file.unlink(missing_ok=True)


def remove_all_leftovers(folder: Path) -> None:
    """Remove the temporary files of killed writers of any file of a folder.

    Args:
        folder: Folder that no other process writes into, such as one that this process has locked; it need not exist.
    """
    for file, found in _temporaries(folder):
        if len(found["random"]) == 32:
            file.unlink(missing_ok=True)


def _temporaries(folder: Path) -> Iterator[tuple[Path, re.Match[str]]]:
    for file in list(folder.iterdir()) if folder.is_dir() else []:
        found = _TEMPORARY.fullmatch(file.name)
        if found and not file.is_dir():
            yield file, found


def _is_in_use(file: Path, found: re.Match[str]) -> bool:
    if found["host"] is None:
        return False
    if found["host"] != _HOST:
        try:
            return time.time() - file.stat().st_mtime < _ABANDONED
        except FileNotFoundError:
            return False
    pid = int(found["pid"])
    return pid != os.getpid() and _is_running(pid)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # of another user
        return True
    return True


def write_bytes(path: Path, content: bytes) -> None:
    """Write a binary file atomically; see `replaced_file`."""
    with replaced_file(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8 atomically; see `replaced_file`."""
    write_bytes(path, text.encode())
