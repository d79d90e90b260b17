"""The contract, on every registered task, on two further data sets, and on tasks that break it."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from bmoe_lightning.data.questions import Question
from bmoe_lightning.data.tasks.arc import ARC
from bmoe_lightning.data.tasks.base import Row, Task
from bmoe_lightning.data.tasks.columns import bool_column, index_column, text_column, texts_column
from bmoe_lightning.data.tasks.contract import check_task
from bmoe_lightning.data.tasks.openbookqa import OpenBookQA
from bmoe_lightning.data.tasks.registry import task_names

SAMPLES = Path(__file__).parent / "samples"


def sample(name: str) -> list[dict]:
    file = SAMPLES / f"{name}.jsonl"
    assert file.is_file(), f"every registered task needs a few rows in {file}"
    return [json.loads(line) for line in file.read_text().splitlines()]


@dataclass(frozen=True)
class YesNo(Task):
    """BoolQ's rows: a passage, a boolean, no ids, and a test split whose answers are hidden."""

    name: str = "yes_no"
    label: str = "Yes or no"
    url: str = "https://huggingface.co/datasets/google/boolq"
    columns: tuple[str, ...] = ("question", "passage", "answer")
    validation_splits: tuple[str, ...] = ()
    test_splits: tuple[str, ...] = ("validation",)

    def question(self, row: Row, row_id: str) -> Question:
        answer = int(bool_column(row, "answer"))
        asked = text_column(row, "question")
        return Question(row_id, asked, ("no", "yes"), answer, passage=text_column(row, "passage"))


@dataclass(frozen=True)
class Subjects(Task):
    """MMLU's rows: the answer's position, no ids, and a few-shot split that is no validation split."""

    name: str = "subjects"
    label: str = "Subjects"
    url: str = "https://huggingface.co/datasets/cais/mmlu"
    columns: tuple[str, ...] = ("question", "subject", "choices", "answer")
    default_config: str | None = "all"
    train_splits: tuple[str, ...] = ("auxiliary_train",)
    validation_splits: tuple[str, ...] = ("validation",)

    def question(self, row: Row, row_id: str) -> Question:
        choices = texts_column(row, "choices")
        return Question(row_id, text_column(row, "question"), choices, index_column(row, "answer", len(choices)))


YES_NO = [
    {"question": "do corks float", "passage": "Cork is lighter than water.", "answer": True},
    {"question": "do nails float", "passage": "Iron is heavier than water.", "answer": False},
]
SUBJECTS = [
    {"question": "2 + 2?", "subject": "sums", "choices": ["3", "4", "5"], "answer": 1},
    {"question": "2 + 3?", "subject": "sums", "choices": ["3", "4", "5"], "answer": 2},
]


@pytest.mark.parametrize("name", task_names())
def test_registered_tasks(name):
    check_task(name, sample(name))


@pytest.mark.parametrize(("task", "rows"), [(YesNo(), YES_NO), (Subjects(), SUBJECTS)], ids=["yes_no", "subjects"])
def test_a_passage_a_boolean_a_position_and_rows_without_ids(task, rows):
    check_task(task, rows)
    first, second = (task.read(row, f"test-{n}", "here") for n, row in enumerate(rows, start=1))
    assert (first.id, second.id) == ("test-1", "test-2")
    assert first.choices[first.answer] in ("yes", "4")
    assert second.choices[second.answer] in ("no", "5")


class Lenient(YesNo):
    """Takes everything that is no `True` for a no."""

    def question(self, row, row_id):
        choices = ("no", "yes")
        return Question(
            row_id, text_column(row, "question"), choices, int(row.get("answer") is True), text_column(row, "passage")
        )


class Unnamed(YesNo):
    """Says that something is wrong, but not with which column."""

    def question(self, row, row_id):
        try:
            return super().question(row, row_id)
        except ValueError:
            raise ValueError("the row is malformed") from None


class Crashing(YesNo):
    def question(self, row, row_id):
        return Question(row_id, row["question"].strip(), ("no", "yes"), int(row["answer"]), row["passage"].strip())


class OneChoice(YesNo):
    def question(self, row, row_id):
        return replace(super().question(row, row_id), choices=("yes", " yes"))


class OneId(YesNo):
    def question(self, row, row_id):
        return super().question(row, "always the same")


class Constant(YesNo):
    def question(self, row, row_id):
        return Question(row_id, "Why?", ("no", "yes"), 0)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (Lenient(), "a row whose answer is missing becomes"),
        (Unnamed(), "refused without naming"),
        (Crashing(), "raises AttributeError"),
        (OneChoice(), "1 distinct choices"),
        (OneId(), "not all different"),
        (Constant(), "fewer than two columns"),
        (replace(YesNo(), name="Yes No"), "the name 'Yes No'"),
        (replace(YesNo(), label=" "), "label is empty"),
        (replace(YesNo(), url="boolq"), "no https address"),
        (replace(YesNo(), columns=()), "columns is empty"),
        (replace(YesNo(), columns=("question", "title")), "which the row does not have"),
        (replace(YesNo(), test_splits=()), "need a name each"),
        (replace(YesNo(), validation_splits=("validation",)), "validation stands for two splits"),
        (replace(YesNo(), default_config="a", configs=("a", "b")), "give one of the two"),
    ],
)
def test_what_breaks_the_contract_is_named(task, message):
    with pytest.raises(AssertionError, match=message):
        check_task(task, YES_NO)


def test_a_task_that_takes_another_one_s_rows_is_found():
    rows = sample("arc")
    check_task("arc", rows)
    assert ARC().columns < OpenBookQA().columns  # the same number: rows with both question columns are nobody's
    with pytest.raises(ValueError, match="fit the tasks openbookqa, arc"):
        check_task("openbookqa", [{**row, "question_stem": "also"} for row in rows])


def test_a_single_row_is_not_enough():
    with pytest.raises(AssertionError, match="at least two rows, got 1"):
        check_task(YesNo(), YES_NO[:1])
