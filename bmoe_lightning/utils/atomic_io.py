"""Atomic writes: a reader sees either the old or the new content of a file, and a failed write leaves the old one."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
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

    Args:
        path: Target path that no other process is writing; it need not exist.
    """
    leftover = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]+\.tmp")
    found = list(path.parent.iterdir()) if path.parent.is_dir() else []
    for file in found:
        if leftover.fullmatch(file.name):
            file.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a binary file atomically; see `replaced_file`."""
    with replaced_file(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8 atomically; see `replaced_file`."""
    write_bytes(path, text.encode())
