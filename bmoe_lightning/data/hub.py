"""Read multiple-choice data in the column schema of the public hub, from local files or from the hub itself.

Rows carry `id`, `question_stem` (OpenBookQA) or `question` (ARC), `choices` with `text` and `label`, and `answerKey`.
The answer is always looked up among the row's own labels: ARC has items labelled 1 to 4 and items with 3 or 5 choices,
so arithmetic on the key's character code silently marks wrong answers as right.
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

from bmoe_lightning.data.questions import Question

SplitName = Literal["train", "validation", "test"]

# The hub calls it validation, the original archives dev.
_FILE_STEMS: dict[str, tuple[str, ...]] = {
    "train": ("train",),
    "validation": ("validation", "valid", "dev"),
    "test": ("test",),
}
_DEFAULT_CONFIGS = {"allenai/openbookqa": "main"}
_CONFIGS_TO_CHOOSE = {"allenai/ai2_arc": ("ARC-Easy", "ARC-Challenge")}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SHARD = re.compile(r"-\d+-of-(\d+)$")


class DataUnavailableError(RuntimeError):
    """Data or a tokenizer was asked for by its hub id, and the hub could not give it."""


def parse_openbookqa(row: Mapping[str, Any], where: str) -> Question:
    """Turn one OpenBookQA row into a question.

    Args:
        row: columns `id`, `question_stem`, `choices`, `answerKey`; the original archive's nested
            `question: {stem, choices: [{text, label}]}` is read as well.
        where: file and line, put in front of every message.

    Raises:
        ValueError: naming `where` and the reason, if the row is malformed.
    """
    return _parse(row, where, "question_stem")


def parse_arc(row: Mapping[str, Any], where: str) -> Question:
    """Turn one ARC row into a question.

    Args:
        row: columns `id`, `question`, `choices`, `answerKey`; the original archive's nested
            `question: {stem, choices: [{text, label}]}` is read as well.
        where: file and line, put in front of every message.

    Raises:
        ValueError: naming `where` and the reason, if the row is malformed.
    """
    return _parse(row, where, "question")


TASKS: dict[str, Callable[[Mapping[str, Any], str], Question]] = {"openbookqa": parse_openbookqa, "arc": parse_arc}


def _parse(row: Mapping[str, Any], where: str, text_column: str) -> Question:
    nested = row.get("question")
    if isinstance(nested, Mapping):
        text, choices = nested.get("stem"), nested.get("choices")
    else:
        text, choices = row.get(text_column), row.get("choices")
    missing = [
        name
        for name, value in (("id", row.get("id")), (text_column, text), ("choices", choices))
        if value is None or value == ""
    ]
    if missing:
        raise ValueError(f"{where}: {', '.join(missing)} missing; the columns found are {sorted(row)}.")
    texts, labels = _choice_columns(choices, where)
    key = str(row.get("answerKey") or "").strip()
    if not key:
        raise ValueError(f"{where}: answerKey is empty; a split with hidden answers cannot be used.")
    if key not in labels:
        raise ValueError(f"{where}: answerKey {key!r} is none of the labels {labels}.")
    try:
        return Question(id=str(row["id"]), question=text, choices=tuple(texts), answer=labels.index(key))  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None


def _choice_columns(choices: object, where: str) -> tuple[list[Any], list[str]]:
    """Return `(texts, labels)` of either layout: a mapping of two lists, or a list of mappings."""
    try:
        if isinstance(choices, Mapping):
            texts, labels = list(choices["text"]), list(choices["label"])
        else:
            texts, labels = [c["text"] for c in choices], [c["label"] for c in choices]  # type: ignore[attr-defined]
    except (KeyError, TypeError):
        raise ValueError(
            f"{where}: choices must hold 'text' and 'label', as two lists or as a list of pairs; found {choices!r}."
        ) from None
    labels = [str(label).strip() for label in labels]
    if len(texts) != len(labels):
        raise ValueError(f"{where}: {len(texts)} choice texts but {len(labels)} labels.")
    if len(set(labels)) != len(labels):
        raise ValueError(f"{where}: the choice labels {labels} are not all different.")
    return texts, labels


def _parse_by_columns(row: Mapping[str, Any], where: str) -> Question:
    return (parse_openbookqa if "question_stem" in row else parse_arc)(row, where)


@overload
def load_questions(
    source: str | os.PathLike[str],
    split: Literal["train", "test"],
    *,
    task: str | None = None,
    revision: str | None = None,
) -> tuple[Question, ...]: ...
@overload
def load_questions(
    source: str | os.PathLike[str],
    split: Literal["validation"],
    *,
    task: str | None = None,
    revision: str | None = None,
) -> tuple[Question, ...] | None: ...
def load_questions(
    source: str | os.PathLike[str], split: SplitName, *, task: str | None = None, revision: str | None = None
) -> tuple[Question, ...] | None:
    """Load one split.

    Args:
        source: a local folder, or a hub id such as `allenai/openbookqa`. Either may be followed by `:CONFIG`
            (`allenai/ai2_arc:ARC-Easy`); for a folder that names a sub-folder. A folder holds `train.jsonl`,
            `train.json` (one object a line) or `train*.parquet`, and the like for `validation` (also `valid`, `dev`)
            and `test`, directly or in one sub-folder.
        split: `train`, `validation` or `test`.
        task: how to read a row, a key of `TASKS`; by default the columns decide.
        revision: revision of a hub data set; refused for a folder.

    Returns:
        The questions in file order; None if there is no validation split.

    Raises:
        DataUnavailableError: if the hub cannot be reached, is switched off (`HF_HUB_OFFLINE`), or does not have the id.
        FileNotFoundError: if the train or test split is missing.
        ValueError: if the source, the task or a row cannot be understood, or more than one file could be meant.
    """
    if split not in _FILE_STEMS:
        raise ValueError(f"split {split!r} is not known; choose from {', '.join(_FILE_STEMS)}.")
    if task is not None and task not in TASKS:
        raise ValueError(f"task {task!r} is not known; choose from {', '.join(TASKS)}, or leave it out.")
    folder = _local_folder(str(source))
    if folder is not None and revision is not None:
        raise ValueError(f"revision {revision!r} belongs to a hub id, but {source} is a local folder; leave it out.")
    rows = _hub_rows(str(source), split, revision) if folder is None else _local_rows(folder, split)
    if rows is None:
        if split == "validation":
            return None
        raise FileNotFoundError(f"{source} has no {split} split; expected {split}.jsonl, .json or .parquet files.")
    parse = _parse_by_columns if task is None else TASKS[task]
    return tuple(parse(row, where) for where, row in rows)


def is_hub_id(source: str) -> bool:
    """Return whether `source` means the hub: shaped like `owner/name[:config]`, and no local folder of that name."""
    return _local_folder(source) is None


def _local_folder(source: str) -> Path | None:
    """Return the folder that `source` names, or None if it is a hub id."""
    base, _, config = source.rpartition(":") if ":" in source else (source, "", "")
    for candidate in (Path(source), Path(base) / config):
        if source and candidate.is_dir():
            return candidate
    if _HUB_ID.fullmatch(base) and not Path(source).exists():
        return None
    kind = "a file" if Path(source).is_file() else "not there"
    raise ValueError(f"data source {source!r} is {kind}; give a folder, or a hub id such as allenai/openbookqa.")


def _local_rows(folder: Path, split: str) -> Iterator[tuple[str, Any]] | None:
    files = _split_files(folder, split)
    if not files:
        folders = [sub for sub in sorted(folder.iterdir()) if sub.is_dir()]
        nested = {sub.name: found for sub in folders if (found := _split_files(sub, split))}
        if len(nested) > 1 and "main" not in nested:
            raise ValueError(
                f"{folder} has a {split} split in several sub-folders: {', '.join(nested)}; "
                f"name one, as in '{folder}:{next(iter(nested))}'."
            )
        files = nested.get("main") or next(iter(nested.values()), [])
    if not files:
        return None
    return (numbered for file in files for numbered in _file_rows(file))


def _split_files(folder: Path, split: str) -> list[Path]:
    """Return the files of one split: a single lines file, or all shards of one parquet set."""
    forms: list[list[Path]] = []
    for stem in _FILE_STEMS[split]:
        forms += [[path] for suffix in (".jsonl", ".json") if (path := folder / f"{stem}{suffix}").is_file()]
        shards = sorted(p for p in folder.glob(f"{stem}*.parquet") if re.fullmatch(rf"{stem}([-_.].*)?", p.stem))
        forms += [shards] if shards else []
    if len(forms) > 1:
        names = ", ".join(path.name for form in forms for path in form)
        raise ValueError(f"{folder} has the {split} split more than once: {names}; keep one.")
    if not forms:
        return []
    _check_shards_complete(forms[0])
    return forms[0]


def _check_shards_complete(files: Sequence[Path]) -> None:
    for file in files:
        shard = _SHARD.search(file.stem)
        if shard and int(shard.group(1)) != len(files):
            raise ValueError(f"{file} is one of {int(shard.group(1))} shards, but {len(files)} are there.")


def _file_rows(file: Path) -> Iterator[tuple[str, Any]]:
    """Yield `(where, row)`; lines and rows are counted from 1."""
    if file.suffix == ".parquet":
        import pyarrow.parquet

        for number, row in enumerate(pyarrow.parquet.read_table(file).to_pylist(), start=1):
            yield f"{file}, row {number}", row
        return
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        where = f"{file}, line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except ValueError as error:
            raise ValueError(f"{where}: not a JSON object ({error}); one object a line is expected.") from None
        if not isinstance(row, dict):
            raise ValueError(f"{where}: a JSON {type(row).__name__}; one object a line is expected.")
        yield where, row


def _hub_rows(source: str, split: str, revision: str | None) -> Iterator[tuple[str, Any]] | None:
    name, _, config = source.partition(":")
    if not config and name in _CONFIGS_TO_CHOOSE:
        choices = " or ".join(f"{name}:{option}" for option in _CONFIGS_TO_CHOOSE[name])
        raise ValueError(f"{name} holds several tasks; write {choices}.")
    # Late: the import takes seconds, and local files do without it.
    import datasets

    try:
        loaded = datasets.load_dataset(name, config or _DEFAULT_CONFIGS.get(name), revision=revision)
    except OSError as error:
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise DataUnavailableError(
            f"{source!r} could not be had from the hub ({reason}); the path of a local folder with train.jsonl and "
            "test.jsonl, or parquet files, works instead."
        ) from None
    if split not in loaded:
        return None
    return ((f"{source} {split}, row {number}", row) for number, row in enumerate(loaded[split], start=1))
