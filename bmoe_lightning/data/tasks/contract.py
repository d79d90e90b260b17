"""The contract test of tasks: `check_task(MyTask(), rows)`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bmoe_lightning.data.prompts import PROMPT_NAMES, get_prompt_format
from bmoe_lightning.data.questions import Question
from bmoe_lightning.data.tasks.base import Row, Task
from bmoe_lightning.data.tasks.registry import get_task, recognise_task, task_names

_NAME = re.compile(r"[a-z][a-z0-9_]*")
# For any column that a question is made from, at least one of these values is malformed.
_DAMAGES: Mapping[str, Any] = {
    "null": None,
    "an empty text": "",
    "white space": " \n",
    "a number": 0.5,
    "an empty list": [],
    "a list": [["nested"]],
    "a mapping": {"nested": "mapping"},
    "half a surrogate pair": "\ud800",
}
_REMOVED = object()


def check_task(task: str | Task, rows: Sequence[Row]) -> None:
    """Check a task on a few rows of its data.

    Checked are: the description of the task; that the task is recognised by its columns; that each row becomes a
    question with at least two distinct choices and a unique id, and every prompt format can write it out; and that
    a row is refused, with a sentence that names row and column, where a column that the question is made from is
    missing, empty or of another type.

    Args:
        task: Registered name, `package.module:Class`, or instance.
        rows: At least two different rows, as the hub gives them.

    Raises:
        AssertionError: If the task breaks the contract; the message says how.
    """
    task = get_task(task)
    _check_description(task)
    _require(len(rows) >= 2, f"{task.name}: give at least two rows, got {len(rows)}")
    questions = [task.read(row, f"test-{number}", f"row {number}") for number, row in enumerate(rows, start=1)]
    for row, question in zip(rows, questions, strict=True):
        _check_recognised(task, row)
        _check_question(task, question)
    ids = [question.id for question in questions]
    _require(len(set(ids)) == len(ids), f"{task.name}: the ids {ids} of different rows are not all different")
    for row, question in zip(rows, questions, strict=True):
        _check_refusals(task, row, question)


def _check_description(task: Task) -> None:
    _require(bool(_NAME.fullmatch(task.name)), f"the name {task.name!r} has more than lower-case letters, digits and _")
    _require(bool(task.label.strip()), f"{task.name}: label is empty")
    _require(task.url.startswith("https://"), f"{task.name}: url {task.url!r} is no https address of a data set card")
    _require(bool(task.columns), f"{task.name}: columns is empty; rows could not be recognised")
    _require(
        bool(task.train_splits and task.test_splits), f"{task.name}: train_splits and test_splits need a name each"
    )
    _require(
        task.default_config is None or not task.configs,
        f"{task.name}: configs are to choose from where there is no default_config; give one of the two",
    )
    shared = set(task.train_splits) & {*task.validation_splits, *task.test_splits}
    shared |= set(task.validation_splits) & set(task.test_splits)
    _require(not shared, f"{task.name}: {', '.join(sorted(shared))} stands for two splits")
    _require(hash(task) == hash(get_task(task)), f"{task.name}: a task is a frozen dataclass")


def _check_recognised(task: Task, row: Row) -> None:
    absent = [column for column in task.columns if column not in row]
    _require(not absent, f"{task.name}: columns names {absent}, which the row does not have: {sorted(row)}")
    if task.name in task_names():
        name = recognise_task(row).name
        _require(name == task.name, f"{task.name}: a row with the columns {sorted(row)} is recognised as {name}")


def _check_question(task: Task, question: Question) -> None:
    distinct = len({choice.strip() for choice in question.choices})
    _require(distinct >= 2, f"{task.name}: question {question.id!r} has {distinct} distinct choices")
    for name in PROMPT_NAMES:
        prompt_format = get_prompt_format(name)
        if not prompt_format.applies(question):
            continue
        prompt = prompt_format.render(question)
        _require(prompt == prompt.rstrip(), f"{task.name}: the prompt {name!r} of {question.id!r} ends in white space")
        written = " ".join([prompt, *prompt_format.answers(question)])
        for text in (question.question, question.passage or "", *question.choices):
            _require(text.strip() in written, f"{task.name}: the prompt {name!r} of {question.id!r} lacks {text!r}")


def _check_refusals(task: Task, row: Row, question: Question) -> None:
    columns_used = 0
    for column in row:
        outcomes = [_outcome(task, damaged, column, how) for how, damaged in _damaged(row, column)]
        # A column in which no damage has an effect is not read; a missing id may be replaced.
        if all(_same(question, outcome) for outcome in outcomes):
            continue
        columns_used += 1
        for (how, _), outcome in zip(_damaged(row, column), outcomes, strict=True):
            _require(
                outcome is None or _same(question, outcome),
                f"{task.name}: a row whose {column} is {how} becomes {outcome}; refuse it",
            )
    _require(columns_used >= 2, f"{task.name}: fewer than two columns of {sorted(row)} matter to the question")


def _damaged(row: Row, column: str) -> Iterator[tuple[str, Row]]:
    for how, value in {"missing": _REMOVED, **_DAMAGES}.items():
        yield (
            how,
            {name: content for name, content in row.items() if name != column}
            | ({} if value is _REMOVED else {column: value}),
        )


def _outcome(task: Task, row: Row, column: str, how: str) -> Question | None:
    """The question of a damaged row, or None where it is refused as it has to be."""
    try:
        return task.read(row, "test-1", "data.jsonl, line 1")
    except ValueError as error:
        message = str(error)
    except Exception as error:  # whatever a task raises breaks the contract
        raise AssertionError(f"{task.name}: {column} that is {how} raises {error!r}; raise a ValueError") from error
    for part in ("data.jsonl, line 1", column):
        _require(part in message, f"{task.name}: {column} that is {how} is refused without naming {part!r}: {message}")
    return None


def _same(question: Question, other: Question | None) -> bool:
    return other is not None and _content(question) == _content(other)


def _content(question: Question) -> tuple[object, ...]:
    return question.passage, question.question, question.choices, question.answer


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)
