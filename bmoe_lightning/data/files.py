"""The splits of a local folder: JSON Lines or parquet files with the names of the hub."""

from __future__ import annotations

import codecs
import json
import logging
import re
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bmoe_lightning.data.tasks.base import NumberedRow
from bmoe_lightning.utils.messages import first_line, shown

_SUFFIXES = (".jsonl", ".json", ".parquet")
_ROWS_AT_A_TIME = 1000
_logger = logging.getLogger(__name__)


class DataUnavailableError(RuntimeError):
    """Data or a tokenizer could not be loaded from a folder or from the hub."""


class FolderData:
    """The data of a folder, or of one of its sub-folders: all splits come from the same one.

    Args:
        folder: Existing folder.
        split_names: Names that a split may have; the first folder with a file of one of them is used. Hidden
            sub-folders, such as caches and copies of editors, are not searched.
        preferred: Names of the sub-folder to use if several have files.

    Raises:
        ValueError: If the choice between several sub-folders is ambiguous.
        DataUnavailableError: If the folder cannot be read.
    """

    def __init__(self, folder: Path, split_names: Collection[str], preferred: Collection[str]) -> None:
        self.folder = folder
        with readable(folder):
            if _has_split(folder, split_names):
                return
            folders = [sub for sub in sorted(folder.iterdir()) if sub.is_dir() and not sub.name.startswith(".")]
        nested, unread = [], None
        for sub in folders:
            try:
                with readable(sub):
                    nested += [sub] if _has_split(sub, split_names) else []
            except DataUnavailableError as error:  # a system folder, unless there is no other
                unread = error
        if unread is not None and not nested:
            raise unread
        chosen = nested if len(nested) == 1 else [sub for sub in nested if sub.name in preferred]
        if len(chosen) == 1:
            self.folder = chosen[0]
        elif nested:
            raise ValueError(
                f"{folder} has data in several sub-folders: {', '.join(sub.name for sub in nested)}; "
                f"name one, as in '{folder}:{nested[0].name}'"
            )

    def rows(self, names: Sequence[str]) -> Iterator[NumberedRow] | None:
        """The rows of a split, or None if there is no file of it.

        Args:
            names: Possible names of the split.

        Raises:
            ValueError: If there are several files for the split, shards are missing, or, while iterating, a file is
                malformed or is a folder.
            DataUnavailableError: If the folder or, while iterating, a file cannot be read.
        """
        with readable(self.folder):
            forms = [form for name in names for form in _forms(self.folder, name)]
        if len(forms) > 1:
            files = ", ".join(path.name for form in forms for path in form)
            raise ValueError(f"{self.folder} has one split more than once: {files}; remove all but one")
        if not forms:
            return None
        return _logged_rows(forms[0])


def _logged_rows(files: Sequence[Path]) -> Iterator[NumberedRow]:
    count = 0
    for file in files:
        for row in file_rows(file):
            yield row
            count += 1
    # Only once all rows are read: the first one alone may be read to recognise the task.
    _logger.info("read %d rows of %s", count, ", ".join(map(str, files)))


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Convert errors of the file system to a `DataUnavailableError` that names the path.

    Args:
        path: File or folder that is read within the context.
    """
    try:
        yield
    except OSError as error:
        raise DataUnavailableError(f"{path} cannot be read ({first_line(error)}); check or download it again") from None


def warn_of_unread_files(folder: Path, names: Collection[str]) -> None:
    """Warn of files and folders that look like a split which the folder does not have under a name that is read.

    Args:
        folder: Folder, which is searched with its sub-folders.
        names: Names of the split.
    """
    starts = tuple(names)
    found = [
        str(path.relative_to(folder))
        for path in sorted([*folder.glob("*"), *folder.glob("*/*")])
        if path.name.lower().startswith(starts) and (path.is_file() or path.stem.lower() in names)
    ]
    if found:
        warnings.warn(
            f"{', '.join(found[:3])} in {folder} is not read, since the file of a split has the exact name "
            f"{starts[0]}.jsonl, {starts[0]}.json or {starts[0]}.parquet; rename it if it is that split",
            UserWarning,
            stacklevel=3,
        )


def _has_split(folder: Path, names: Collection[str]) -> bool:
    return any(_forms(folder, name) for name in names)


def _forms(folder: Path, name: str) -> list[list[Path]]:
    """The files of a split by format: JSON Lines, one parquet file, or shards with one total count."""
    # Whatever has the name: a broken link or a folder is refused when it is read, not taken for a missing split.
    present = {path.name for path in folder.iterdir()}
    single = [[folder / f"{name}{suffix}"] for suffix in _SUFFIXES if f"{name}{suffix}" in present]
    # Older data sets on the hub have a hash after the count.
    shard = re.compile(rf"{re.escape(name)}-(\d+)-of-(\d+)(-[0-9a-f]+)?")
    counts: dict[int, list[tuple[int, Path]]] = {}
    for path in (folder / found for found in present if found.endswith(".parquet")):
        if (match := shard.fullmatch(path.stem)) is not None:
            counts.setdefault(int(match[2]), []).append((int(match[1]), path))
    return [*single, *(_complete(sorted(shards), count) for count, shards in sorted(counts.items()))]


def _complete(shards: list[tuple[int, Path]], count: int) -> list[Path]:
    if [number for number, _ in shards] != list(range(count)):
        raise ValueError(
            f"{shards[0][1]} is one of {count} shards, but {len(shards)} are there; download all of them, once"
        )
    return [path for _, path in shards]


def file_rows(file: Path) -> Iterator[NumberedRow]:
    """The rows of a file in JSON Lines or parquet: `(location, columns)`, lines and rows counted from 1.

    Args:
        file: The file.

    Raises:
        ValueError: While iterating, if the file is malformed or is a folder.
        DataUnavailableError: If it cannot be read.
    """
    with readable(file):
        if file.is_dir():
            raise ValueError(
                f"{file} is a folder; write the split to one file of that name, or name its parts "
                f"{file.stem}-00000-of-00002.parquet ..."
            )
        yield from _parquet_rows(file) if file.suffix == ".parquet" else _json_rows(file)


def _parquet_rows(file: Path) -> Iterator[NumberedRow]:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(file)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no valid parquet file ({first_line(error)}); download it again") from None
    for start in range(0, len(table), _ROWS_AT_A_TIME):
        for number, row in enumerate(_python_rows(table, start, file), start=start + 1):
            yield f"{file}, row {number}", row


def _python_rows(table: Any, start: int, file: Path) -> list[dict[str, Any]]:
    """Some rows of a parquet file."""
    import pyarrow as pa

    # Text that is not UTF-8, and times that Python does not have.
    unreadable = (pa.ArrowException, ValueError, OverflowError)
    part = table.slice(start, _ROWS_AT_A_TIME)
    try:
        return part.to_pylist()
    except unreadable:
        for position in range(len(part)):  # only to say which row it is
            try:
                part.slice(position, 1).to_pylist()
            except unreadable as error:
                raise ValueError(
                    f"{file}, row {start + position + 1}: a value cannot be read ({first_line(error)}); repair or drop "
                    "the row"
                ) from None
        raise


def _json_rows(file: Path) -> Iterator[NumberedRow]:
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        text = line.removeprefix(codecs.BOM_UTF8)
        if text.strip():
            where = f"{file}, line {number}"
            yield where, _json_object(text, where)


def _json_object(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode(), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: no text in UTF-8 ({first_line(error)}); save the file in UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not a JSON object ({first_line(error)}); write one object a line") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a JSON {type(row).__name__}; write one object a line")
    return row


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {shown(next(name for name in names if names.count(name) > 1))} is duplicate")
    return row
