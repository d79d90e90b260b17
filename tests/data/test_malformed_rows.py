"""Rows and files of every task, changed in every place: read right, or refused with file, line and reason."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import datasets
import pytest
from data_strategies import REMOVED, changed

from bmoe_lightning.data.files import DataUnavailableError
from bmoe_lightning.data.hub import load_questions
from bmoe_lightning.data.tasks import get_task

SAMPLES = Path(__file__).parent / "tasks" / "samples"
TASKS = sorted(path.stem for path in SAMPLES.glob("*.jsonl"))
TEXT, KEY, CONTAINER, BLANK, UNREAD = "text", "key", "container", "blank", "unread"
# What the answer may be, where it is no label of the row's own.
ANSWERS = {"winogrande": ("1", "2"), "boolq": (True, False), "mmlu": (0, 1, 2, 3)}
BAD = [
    REMOVED, None, "", "  ", "\t\n", True, False, 1.5, -0.0, float("nan"), float("inf"), [], {}, [[]], [None], ["x"],
    {"text": "x"}, {"x": 1}, "\ud800", "a\udfff", [1, 2], {"text": ["a"], "label": ["A"]}, "ABCD",
    0, -1, 10**30,
]  # fmt: skip


def rows_of(task):
    return [json.loads(line) for line in (SAMPLES / f"{task}.jsonl").read_text().splitlines()]


def places(value, path=()):
    """Every place of a JSON value, the whole left out."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def kind_of(task, path, row):
    for key in path:
        row = row[key]
    if isinstance(row, (dict, list)):
        return CONTAINER
    if path[0] in ("subject", "choice_type", "exp", "subject_name", "topic_name", "support"):
        return UNREAD
    if path == ("cop",):
        return (0, 1, 2, 3)
    if path == ("sentence",):
        return BLANK
    if path in (("answer",), ("label",)):
        return ANSWERS[task] if path == ("answer",) else (0, 1)
    return KEY if {"id", "label", "answerKey"} & set(path) else TEXT


def is_valid(kind, value):
    """Whether a place may hold a value."""
    if isinstance(kind, tuple):
        return any(value == valid and type(value) is type(valid) for valid in kind)
    if kind == KEY and isinstance(value, int) and not isinstance(value, bool):
        return True
    return (
        kind in (TEXT, KEY, BLANK)
        and isinstance(value, str)
        and bool(value.strip())
        and not re.search("[\ud800-\udfff]", value)
        and (kind != BLANK or "_" in value)
    )


def read(folder, task):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_questions(folder, "train", task=task)


def outcome(folder, task):
    """The questions, or why there are none."""
    try:
        return read(folder, task), None
    except (ValueError, DataUnavailableError) as error:
        return None, str(error)


@pytest.mark.parametrize("task", TASKS)
def test_no_malformed_row_is_read(task, tmp_path):
    get_task(task)
    file = tmp_path / "train.jsonl"
    refused = accepted = 0
    for number, row in enumerate(rows_of(task)):
        file.write_text("\n" + json.dumps(row) + "\n")
        intact = read(tmp_path, task)
        for path in places(row):
            kind = kind_of(task, path, row)
            for value in BAD:
                file.write_text("\n" + json.dumps(changed(row, path, value)) + "\n")
                questions, reason = outcome(tmp_path, task)
                if reason is not None:
                    assert kind != UNREAD, (path, value)
                    assert reason.startswith(f"{file}, line 2: "), (path, value)
                    refused += 1
                    continue
                if kind == UNREAD:
                    assert questions == intact, (path, value)
                    continue
                assert value is not REMOVED, (number, path)
                assert is_valid(kind, value), (path, value, questions)
                if kind == TEXT:
                    assert value in (questions[0].question, questions[0].passage, *questions[0].choices)
                accepted += 1
    assert refused > 200
    assert accepted < refused / 5


@pytest.mark.parametrize("task", TASKS)
def test_a_truncated_file_is_refused_or_ends_at_a_line(task, tmp_path):
    content = (SAMPLES / f"{task}.jsonl").read_bytes().rstrip(b"\n")
    file = tmp_path / "train.jsonl"
    full = rows_of(task)
    for length in range(1, len(content)):
        file.write_bytes(content[:length])
        lines = content[:length].count(b"\n") + 1
        at_an_end = content[:length].endswith(b"}") and content[length : length + 1] in (b"", b"\n")
        if at_an_end or content[:length].endswith(b"\n"):
            assert len(read(tmp_path, task)) == content[:length].count(b"}\n") + at_an_end <= len(full)
        else:
            with pytest.raises(ValueError, match=re.escape(f"{file}, line {lines}: ")):
                read(tmp_path, task)


@pytest.mark.parametrize("task", TASKS)
def test_a_damaged_parquet_file_is_read_or_named(task, tmp_path):
    file = tmp_path / "train.parquet"
    datasets.Dataset.from_list(rows_of(task)).to_parquet(str(file))
    content = file.read_bytes()
    for position in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        file.write_bytes(damaged)
        reason = outcome(tmp_path, task)[1]
        assert reason is None or str(file) in reason  # many flips are inside texts and cannot be noticed


def test_questions_whose_label_is_arbitrary_are_named(tmp_path):
    row = {"question": "?", "choices": {"text": ["a", "b", "A "], "label": ["1", "2", "3"]}}
    rows = [{**row, "id": "first", "answerKey": "3"}, {**row, "id": "second", "answerKey": "2"}]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.warns(UserWarning, match="1 of 2 train questions have another choice .*: first; repair"):
        assert len(load_questions(tmp_path, "train", task="arc")) == 2
