"""Any row of any task: read as it was written, or refused with file, line and reason."""

from __future__ import annotations

import json
import warnings

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_strategies import ROWS, VALUES, Stored, damaged, extended
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from bmoe_lightning.data.hub import load_questions
from bmoe_lightning.data.questions import Question
from bmoe_lightning.data.tasks import built_in_task_names, get_task

ONE_LINE = 900  # characters of a message, beside the file's name
WITH_IDS = ("openbookqa", "arc", "medmcqa")
LINE_ENDS = st.sampled_from(["\n", "\r\n"])
BLANKS = st.tuples(st.booleans(), st.booleans(), st.booleans())
"""Whether a blank line stands before each row."""


def of_some_task(strategy):
    """A task, and what a strategy of the rows of that task gives."""
    return st.sampled_from(built_in_task_names()).flatmap(lambda task: st.tuples(st.just(task), strategy(ROWS[task])))


def several(rows, **sizes):
    return st.lists(extended(rows), unique_by=lambda stored: stored.question.id, **sizes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder for all examples, each of which writes its file again."""
    return tmp_path_factory.mktemp("rows")


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    return tmp_path_factory.mktemp("tables")


def read(folder, task):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of choices with one text
        return load_questions(folder, "train", task=task)


def content(question, task):
    """What a row says; the order of the choices where it does."""
    choices = question.choices if task != "sciq" else tuple(sorted(question.choices))
    return question.question, question.passage, choices, question.choices[question.answer]


def json_lines(rows, blanks, *, ascii_only=True):
    """Lines of a file, and the number of the line of each row."""
    lines, numbers = [], []
    for row, is_after_blank in zip(rows, blanks, strict=False):
        lines += [" \t"] * is_after_blank
        lines.append(json.dumps(row, ensure_ascii=ascii_only))
        numbers.append(len(lines))
    return lines, numbers


def check_refusal(folder, task, where, name):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (what the message says is checked below)
        read(folder, task)
    message = str(caught.value)
    assert message.startswith(f"{where}: "), message
    reason = message.removeprefix(f"{where}: ")
    assert name in reason
    assert reason.isprintable()
    assert len(reason) <= ONE_LINE
    assert type(caught.value) is ValueError


CORKS = {"question": "do corks float", "passage": "Cork is light."}
FLOAT = Stored(CORKS | {"answer": True}, Question("q", "do corks float", ("False", "True"), 1, "Cork is light."), {})
CHOICES, OTHERS = {"text": ["a", "b"], "label": ["A", "B"]}, {"text": ["c", "d"], "label": ["A", "B"]}
ARC = {"id": "q", "question": "Which?", "choices": CHOICES, "answerKey": "A"}
MMLU = {"question": "Which?", "subject": "sums", "choices": ["a", "b", "c", "d"], "answer": 1}
LONG, NESTED = "word " * 600, json.loads("[" * 400 + "]" * 400)


@settings(max_examples=50)
@given(
    found=of_some_task(lambda rows: several(rows, min_size=1, max_size=3)),
    blanks=BLANKS,
    ascii_only=st.booleans(),
    start=st.sampled_from(["", "\ufeff"]),
    end=LINE_ENDS,
)
# A mark of the byte order before a blank line was no JSON.
@example(found=("boolq", [FLOAT]), blanks=(True, False, False), ascii_only=True, start="\ufeff", end="\n")
def test_rows_are_read_as_they_were_written(folder, found, blanks, ascii_only, start, end):
    task, stored = found
    lines, _ = json_lines([one.row for one in stored], blanks, ascii_only=ascii_only)
    (folder / "train.jsonl").write_bytes((start + end.join(lines)).encode())
    questions = read(folder, task)
    assert [content(question, task) for question in questions] == [content(one.question, task) for one in stored]
    if task in WITH_IDS:
        assert [question.id for question in questions] == [one.question.id for one in stored]


@settings(max_examples=80)
@given(
    found=of_some_task(lambda rows: st.tuples(several(rows, max_size=2), damaged(rows))), blanks=BLANKS, end=LINE_ENDS
)
# The whole of a long value stood in the message.
@example(found=("mmlu", ([], (MMLU | {"choices": [LONG] * 27}, "choices"))), blanks=(True,), end="\n")
@example(found=("mmlu", ([], (MMLU | {"answer": NESTED}, "answer"))), blanks=(True,), end="\n")
@example(found=("arc", ([], (ARC | {"answerKey": LONG}, "answerKey"))), blanks=(False,), end="\n")
# Of two that contradict each other the first was taken.
@example(found=("boolq", ([FLOAT], (CORKS | {"answer": True, "label": 0}, "label"))), blanks=(0, 1), end="\r\n")
@example(
    found=("arc", ([], (ARC | {"question": {"stem": "Which?", "choices": OTHERS}}, "choices"))),
    blanks=(False,),
    end="\n",
)
def test_a_malformed_row_is_refused_with_its_line(folder, found, blanks, end):
    task, (before, (row, name)) = found
    lines, numbers = json_lines([*(one.row for one in before), row], blanks)
    (folder / "train.jsonl").write_text(end.join(lines), newline="")
    check_refusal(folder, task, f"{folder / 'train.jsonl'}, line {numbers[-1]}", name)


@settings(max_examples=40, suppress_health_check=[HealthCheck.filter_too_much])
@given(found=of_some_task(lambda rows: st.tuples(extended(rows), damaged(rows))))
def test_parquet_says_the_same(tables, found):
    task, (good, (row, name)) = found
    file = tables / "train.parquet"
    assume(is_written(file, [good.row]))
    (question,) = read(tables, task)
    assert content(question, task) == content(good.question, task)
    number = 2 if is_written(file, [good.row, row]) else 1
    assume(number == 2 or is_written(file, [row]))
    check_refusal(tables, task, f"{file}, row {number}", name)


def is_written(file, rows):
    """Whether parquet can hold rows: a column has values of one type."""
    columns = dict.fromkeys(name for row in rows for name in row)
    try:
        pq.write_table(pa.Table.from_pylist([columns | row for row in rows]), file)
    except (pa.ArrowException, OverflowError, UnicodeEncodeError):
        return False
    return True


COLUMNS = [
    *("id", "question", "question_stem", "choices", "answerKey", "passage", "answer", "label", "sentence", "option1"),
    *("option2", "opa", "opb", "opc", "opd", "cop", "correct_answer", "distractor1", "subject"),
]
OBJECTS = VALUES | st.binary(max_size=3) | st.dates() | st.decimals() | st.tuples(VALUES) | st.just({1})


@settings(max_examples=50)
@given(found=of_some_task(extended), others=st.dictionaries(st.sampled_from(COLUMNS), OBJECTS, min_size=1, max_size=3))
def test_whatever_a_row_holds_is_a_question_or_a_refusal(found, others):
    """Python values that are in no file too, in any of the columns that a task reads."""
    task, stored = found
    try:
        get_task(task).read(stored.row | others, "test-1", "here")
    except ValueError as error:
        message = str(error)
    else:
        return
    assert message.startswith("here: ")
    assert len(message) < ONE_LINE
