"""The file of unfinished predictions: a line that says of which command, then a row for each question."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

from bmoe_lightning.command.given import written
from bmoe_lightning.utils.folder_lock import FolderInUseError, locked_folder

_PARTIAL = "partial"


def partial_of(output: Path) -> Path:
    """The file in which the predictions of an output are until all are there.

    Args:
        output: The output.
    """
    return output.with_name(f"{output.name}.{_PARTIAL}")


def check_place(output: Path) -> None:
    """Check that nothing else is where an output, its folder or its partial file goes.

    Args:
        output: The output.

    Raises:
        ValueError: If something is.
        OSError: If its folder cannot be read.
    """
    partial = partial_of(output)
    with written(f"--output {output}", output.parent):
        above = next(folder for folder in output.parents if folder.exists())
        if not above.is_dir():
            raise ValueError(
                f"--output {output} cannot be written, since {above} is a file and no folder; give another name"
            )
        if output.is_dir():
            raise ValueError(f"--output {output} is a folder; give the name of a file")
        if partial.exists() and not partial.is_file():
            raise ValueError(
                f"--output {output} has its unfinished predictions in {partial}, and there is a folder of that name; "
                "rename that, or give another name"
            )


@contextmanager
def locked(output: Path) -> Iterator[Path]:
    """Lock the partial file of an output, which then has one writer; it is created if missing, and removed if empty.

    Args:
        output: The output, whose folder is created if missing.

    Yields:
        The partial file.

    Raises:
        ValueError: If another process has locked it.
        OSError: If it cannot be created, read and written.
    """
    partial = partial_of(output)
    with written(f"--output {output}", output.parent):
        output.parent.mkdir(parents=True, exist_ok=True)
        partial.open("a+b").close()
        before = partial.stat()
    try:
        with locked_folder(partial):
            try:
                if not partial.is_file() or not os.path.samestat(before, partial.stat()):  # its writer has finished
                    raise FolderInUseError
                yield partial
            finally:
                if partial.is_file() and not partial.stat().st_size:
                    partial.unlink()
    except FolderInUseError:
        raise ValueError(
            f"another process is writing --output {output}; wait for its end, or give another name"
        ) from None


def resumed(partial: Path, identity: dict[str, Any], batch_size: int) -> int:
    """The number of questions that an earlier process has predicted, of whole batches; begins an empty file.

    Rows belong to questions by their number: the data are the same to the byte, so ids need not be unique.

    Args:
        partial: The file, which exists.
        identity: What the predictions depend on, in values that JSON has.
        batch_size: Number of questions of a batch.

    Raises:
        ValueError: If the file is that of another command, or nobody's that this one knows.
        OSError: If it cannot be read or written.
    """
    header = f"{json.dumps({_PARTIAL: identity})}\n".encode()
    content = partial.read_bytes()
    if header.startswith(content):  # empty, or the process was killed before it had written the header
        partial.write_bytes(header)
        return 0
    if not content.startswith(header):
        raise ValueError(
            f"{partial} has predictions of another command, or something else; give --overwrite to replace it, or "
            "another name with --output"
        )
    rows = list(takewhile(_is_row, content.removeprefix(header).splitlines(keepends=True)))
    done = len(rows) - len(rows) % batch_size
    os.truncate(partial, len(header) + sum(map(len, rows[:done])))
    return done


def _is_row(line: bytes) -> bool:
    """Whether a line is complete and undamaged."""
    try:
        return line.endswith(b"\n") and isinstance(json.loads(line), dict)
    except ValueError:
        return False


def finished_rows(partial: Path) -> Iterator[str]:
    """The finished rows of a partial file, as lines.

    Args:
        partial: The file.
    """
    with partial.open(encoding="utf-8") as file:
        yield from islice(file, 1, None)
