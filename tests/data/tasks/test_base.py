from dataclasses import dataclass

import pytest

from bmoe_lightning.data.questions import Question
from bmoe_lightning.data.tasks.base import Task


@dataclass(frozen=True)
class Plain(Task):
    name: str = "plain"
    label: str = "Plain"
    url: str = "https://example.org"
    columns: tuple[str, ...] = ("q",)

    def question(self, row, row_id):
        return Question(row_id, row["q"], row["c"], row["a"])


def test_split_names_by_part():
    task = Plain(train_splits=("auxiliary_train", "train"), validation_splits=(), test_splits=("validation",))
    assert [task.split_names(split) for split in ("train", "validation", "test")] == [
        ("auxiliary_train", "train"),
        (),
        ("validation",),
    ]
    assert Plain().split_names("validation") == ("validation", "valid", "val", "dev")


def test_read_names_the_place_of_a_malformed_row():
    row = {"q": "Why?", "c": ["x", "y"], "a": 1}
    assert Plain().read(row, "test-4", "f, line 4") == Question("test-4", "Why?", ("x", "y"), 1)
    for changes, message in (
        ({"q": 3}, "f, line 4: question 'test-4': question must be a text, found the number 3"),
        ({"a": 2}, "f, line 4: question 'test-4': answer 2 is outside"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            Plain().read(row | changes, "test-4", "f, line 4")
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__
    with pytest.raises(ValueError, match=r"f, line 4: c missing; the columns found are \['a', 'q'\]"):
        Plain().read({"q": "Why?", "a": 1}, "test-4", "f, line 4")
