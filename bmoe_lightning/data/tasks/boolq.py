"""BoolQ (Clark et al. 2019, https://arxiv.org/abs/1905.10044): is it so, by the passage?"""

from __future__ import annotations

from dataclasses import dataclass

from bmoe_lightning.data.questions import Question
from bmoe_lightning.data.tasks.base import Row, Task
from bmoe_lightning.data.tasks.columns import bool_column, index_column, text_column
from bmoe_lightning.utils.messages import shown


@dataclass(frozen=True)
class BoolQ(Task):
    """Rows with `question`, `passage` and the boolean `answer`, or SuperGLUE's integer `label` in its place.

    The choices are False and True in this order, so that the position of the answer is the integer of the boolean.
    There is no labelled test split: the validation split is reported, and a part of train is set aside.
    """

    name: str = "boolq"
    label: str = "BoolQ"
    url: str = "https://huggingface.co/datasets/google/boolq"
    columns: tuple[str, ...] = ("question", "passage")
    hub_id: str = "google/boolq"
    validation_splits: tuple[str, ...] = ()
    test_splits: tuple[str, ...] = ("validation", "valid", "val", "dev")

    def question(self, row: Row, row_id: str) -> Question:
        """Turn one row into a question; `Task.question` describes the arguments."""
        if row.get("answer") is None and row.get("label") is None:
            raise ValueError(f"answer (or label) missing; the columns found are {shown(sorted(row))}")
        given = [] if row.get("answer") is None else [int(bool_column(row, "answer"))]
        given += [] if row.get("label") is None else [index_column(row, "label", 2)]
        if len(set(given)) > 1:
            raise ValueError(f"answer is {bool(given[0])}, and label is {given[1]}; leave out the one that is wrong")
        passage = text_column(row, "passage")
        return Question(row_id, text_column(row, "question"), ("False", "True"), given[0], passage=passage)
