"""SciQ (Welbl et al. 2017, https://arxiv.org/abs/1707.06209): science exams, four choices."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from bmoe_lightning.data.questions import Question
from bmoe_lightning.data.tasks.base import Row, Task
from bmoe_lightning.data.tasks.columns import text_column

_CHOICES = ("correct_answer", "distractor1", "distractor2", "distractor3")


@dataclass(frozen=True)
class SciQ(Task):
    """Rows with `question`, `correct_answer` and `distractor1` to `distractor3`; `support`, a passage, is not read.

    The rows have no order of choices. They get one that depends on the question's text alone, so that the answer is at
    every position about equally often, and at the same one in every run and split.
    """

    name: str = "sciq"
    label: str = "SciQ"
    url: str = "https://huggingface.co/datasets/allenai/sciq"
    columns: tuple[str, ...] = ("question", *_CHOICES)
    hub_id: str = "allenai/sciq"

    def question(self, row: Row, row_id: str) -> Question:
        """Turn one row into a question; `Task.question` describes the arguments."""
        text = text_column(row, "question")
        order = sorted(_CHOICES, key=lambda column: hashlib.sha256(f"{column} {text}".encode()).digest())
        choices = tuple(text_column(row, column) for column in order)
        return Question(row_id, text, choices, order.index(_CHOICES[0]))
