"""MedMCQA (Pal et al. 2022, https://arxiv.org/abs/2203.14371): medical entrance exams in 21 subjects, four choices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bmoe_lightning.data.questions import Question
from bmoe_lightning.data.tasks.base import Row
from bmoe_lightning.data.tasks.columns import id_column, index_column, text_column
from bmoe_lightning.data.tasks.subjects import SubjectTask

_CHOICES = ("opa", "opb", "opc", "opd")


@dataclass(frozen=True)
class MedMCQA(SubjectTask):
    """Rows with `id`, `question`, the choices `opa` to `opd` and the position `cop`, counted from 0, as on the hub.

    The original archive counts `cop` from 1; where it says 4, the row is refused. The answers of the test split are not
    public: the validation split is reported, and a part of train is set aside. `subjects` are those of the column
    `subject_name`, such as `("Medicine",)`.
    """

    name: str = "medmcqa"
    label: str = "MedMCQA"
    url: str = "https://huggingface.co/datasets/openlifescienceai/medmcqa"
    columns: tuple[str, ...] = ("question", *_CHOICES, "cop")
    hub_id: str = "openlifescienceai/medmcqa"
    validation_splits: tuple[str, ...] = ()
    test_splits: tuple[str, ...] = ("validation", "valid", "val", "dev")

    subject_column: ClassVar[str] = "subject_name"

    def question(self, row: Row, row_id: str) -> Question:  # noqa: ARG002  # rows have an id
        """Turn one row into a question; `Task.question` describes the arguments."""
        choices = tuple(text_column(row, column) for column in _CHOICES)
        return Question(id_column(row), text_column(row, "question"), choices, index_column(row, "cop", len(choices)))
