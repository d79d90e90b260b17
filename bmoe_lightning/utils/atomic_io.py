"""Files that are replaced whole: a reader sees the old content or the new, and a full disk leaves the old."""

from __future__ import annotations

import glob
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """Give a temporary file beside `path` to write; it takes the place of `path` once the block ends without an error.

    Args:
        path: where to; its folder exists.

    Raises:
        OSError: if the file cannot be written or put in place.
    """
    temporary = path.with_name(f"{_temporary(path)}{uuid.uuid4().hex}.tmp")
    try:
        temporary.touch(exist_ok=False)
        yield temporary
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(path: Path) -> None:
    """Remove what a process that was killed while it wrote `path` has left beside it.

    Args:
        path: a file that no other process is writing; need not exist.
    """
    for found in path.parent.glob(f"{glob.escape(_temporary(path))}*.tmp"):
        found.unlink(missing_ok=True)


def _temporary(path: Path) -> str:
    """How the names of temporary files for `path` begin."""
    return f".{path.name}."


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file; see `replaced_file`."""
    with replaced_file(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write a whole text file in UTF-8; see `replaced_file`."""
    write_bytes(path, text.encode())
