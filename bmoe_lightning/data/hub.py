"""Load the questions of a task, from a local folder or from the hub."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, overload

from bmoe_lightning.data.files import DataUnavailableError, FolderData, readable, warn_of_unread_files
from bmoe_lightning.data.questions import Question, has_ambiguous_answer
from bmoe_lightning.data.tasks.base import SPLIT_NAMES, NumberedRow, SplitName, Task
from bmoe_lightning.data.tasks.registry import get_task, recognise_task, task_names, task_of_hub_id
from bmoe_lightning.utils.messages import first_line, first_names, shown

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@overload
def load_questions(
    source: str | os.PathLike[str],
    split: Literal["train", "test"],
    *,
    task: str | Task | None = None,
    revision: str | None = None,
) -> tuple[Question, ...]: ...
@overload
def load_questions(
    source: str | os.PathLike[str],
    split: Literal["validation"],
    *,
    task: str | Task | None = None,
    revision: str | None = None,
) -> tuple[Question, ...] | None: ...
def load_questions(
    source: str | os.PathLike[str],
    split: SplitName,
    *,
    task: str | Task | None = None,
    revision: str | None = None,
) -> tuple[Question, ...] | None:
    """Load one split.

    Args:
        source: Local folder, or hub id such as `allenai/openbookqa`. Either may be followed by `:CONFIG`
            (`allenai/ai2_arc:ARC-Easy`), which for a folder names a sub-folder. A folder holds `train.jsonl` or
            `train.json` (one object a line), `train.parquet`, or the shards `train-00000-of-00002.parquet`, and the
            same for `validation` (also `valid`, `val`, `dev`) and `test`, all directly or all in one sub-folder.
        split: Split `train`, `validation` or `test`; the task maps it to a split of the data.
        task: Registered name, instance or `package.module:Class`; None recognises the task by hub id or by columns.
        revision: Revision of a hub data set; refused for a folder.

    Returns:
        The questions in file order; None if there is no validation split.

    Warns:
        UserWarning: If questions have another choice with the text of the right one.

    Raises:
        DataUnavailableError: If the hub cannot be reached, is disabled (`HF_HUB_OFFLINE`) or does not have the id, or a
            file cannot be read.
        FileNotFoundError: If the train or test split is missing.
        ValueError: If source, task or a row is malformed, two rows have the same id, or the file of a split is
            ambiguous.
        TypeError: If `task` is no task.
    """
    if split not in SPLIT_NAMES:
        raise ValueError(f"unknown split {split!r}; choose from {', '.join(SPLIT_NAMES)}")
    requested = None if task is None else get_task(task)
    folder = _local_folder(str(source))
    if folder is not None and revision is not None:
        raise ValueError(f"revision {revision!r} belongs to a hub id, but {source} is a local folder; leave it out")
    if folder is None:
        requested = requested or task_of_hub_id(str(source).partition(":")[0])
        rows_of = _hub_rows(str(source), requested, revision)
    else:
        rows_of = _folder_rows(folder, requested)
    row_task = requested or _recognised(rows_of)
    names = (split,) if row_task is None else row_task.split_names(split)
    rows = rows_of(names)
    if rows is not None:
        return () if row_task is None else _questions(row_task, split, rows)
    if split == "validation":
        if folder is not None:
            warn_of_unread_files(folder, names)
        return None
    name = names[0]
    raise FileNotFoundError(
        f"{source} has no {split} split; expected {name}.jsonl, {name}.json, {name}.parquet or the shards "
        f"{name}-00000-of-00002.parquet ..."
    )


def task_of_source(
    source: str | os.PathLike[str], *, task: str | Task | None = None, revision: str | None = None
) -> Task | None:
    """The task of a data set; its first row is read only where neither name nor hub id tells.

    Args:
        source: As in `load_questions`.
        task: As in `load_questions`.
        revision: As in `load_questions`.

    Returns:
        The task; None if the data have no row.

    Raises:
        DataUnavailableError: As `load_questions`.
        ValueError: If source or task is malformed, or no task fits the columns.
        TypeError: If `task` is no task.
    """
    if task is not None:
        return get_task(task)
    folder = _local_folder(str(source))
    if folder is not None:
        return _recognised(_folder_rows(folder, None))
    return task_of_hub_id(str(source).partition(":")[0]) or _recognised(_hub_rows(str(source), None, revision))


def is_hub_id(source: str) -> bool:
    """Whether `source` is a hub id: of the form `owner/name[:config]`, and no local folder.

    Args:
        source: Folder or hub id.

    Raises:
        ValueError: If it is neither.
    """
    return _local_folder(source) is None


_RowsOf = Callable[[Sequence[str]], Iterator[NumberedRow] | None]
"""A function from possible names of a split to its rows, or None if there is none."""


def _folder_rows(folder: Path, requested: Task | None) -> _RowsOf:
    tasks = _all_tasks() if requested is None else [requested]
    names = [name for task in tasks for split in SPLIT_NAMES for name in task.split_names(split)]
    return FolderData(folder, set(names), {task.default_config or "" for task in tasks}).rows


def _hub_rows(source: str, task: Task | None, revision: str | None) -> _RowsOf:
    name, _, config = source.partition(":")
    # A copy under another id may have other configurations.
    if task is not None and task.hub_id == name and not config:
        if task.configs:
            choices = " or ".join(f"{name}:{option}" for option in task.configs)
            raise ValueError(f"{name} has several configurations; write {choices}")
        config = task.default_config or ""
    # Imported late: it takes seconds, and local files do not need it.
    import datasets

    try:
        splits = datasets.load_dataset(name, config or None, revision=revision)
    except OSError as error:
        raise DataUnavailableError(
            f"{source!r} could not be loaded from the hub ({first_line(error)}); the path of a local folder with "
            "train.jsonl and test.jsonl, or parquet files, works instead"
        ) from None

    def rows(names: Sequence[str]) -> Iterator[NumberedRow] | None:
        present = [name for name in names if name in splits]
        if len(present) > 1:
            raise ValueError(
                f"{source} has one split under the names {', '.join(present)}; name a task that selects one of them"
            )
        if not present:
            return None
        return ((f"{source} {present[0]}, row {n}", row) for n, row in enumerate(splits[present[0]], start=1))

    return rows


def _all_tasks() -> list[Task]:
    return [get_task(name) for name in task_names()]


def _recognised(rows_of: _RowsOf) -> Task | None:
    """The task that the data's first row belongs to; None if there is no row."""
    for split in SPLIT_NAMES:
        for name in dict.fromkeys(name for task in _all_tasks() for name in task.split_names(split)):
            where, row = next(rows_of((name,)) or iter(()), (None, None))
            if where is not None and row is not None:
                try:
                    return recognise_task(row)
                except ValueError as error:
                    raise ValueError(f"{where}: {error}") from None
    return None


def _questions(task: Task, split: SplitName, rows: Iterator[NumberedRow]) -> tuple[Question, ...]:
    questions: list[Question] = []
    seen: dict[str, str] = {}
    for number, (where, row) in enumerate(task.select(rows), start=1):
        question = task.read(row, f"{split}-{number}", where)
        # Ids must be unique: predictions are reported by id.
        if question.id in seen:
            raise ValueError(
                f"{where}: the id {shown(question.id)} is that of {seen[question.id]} too; make ids unique"
            )
        seen[question.id] = where
        questions.append(question)
    ambiguous = [question.id for question in questions if has_ambiguous_answer(question)]
    if ambiguous:
        warnings.warn(
            f"{len(ambiguous)} of {len(questions)} {split} questions have another choice with the text of the right "
            f"one, so that their label is arbitrary: {first_names(ambiguous)}; repair or drop them",
            UserWarning,
            stacklevel=3,
        )
    return tuple(questions)


def _local_folder(source: str) -> Path | None:
    """The local folder of `source`, or None if it is a hub id."""
    base, _, config = source.rpartition(":") if ":" in source else (source, "", "")
    for candidate in (Path(source), Path(base) / config):
        with readable(candidate):
            if source and candidate.is_dir():
                return candidate
    if _HUB_ID.fullmatch(base) and not os.path.lexists(source):
        return None
    kind = "a file" if Path(source).is_file() else "not there"
    raise ValueError(f"data source {source!r} is {kind}; give a folder, or a hub id such as allenai/openbookqa")
