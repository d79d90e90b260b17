"""OpenBookQA (Mihaylov et al. 2018, https://arxiv.org/abs/1809.02789): elementary science, four choices."""

from __future__ import annotations

from dataclasses import dataclass

from bmoe_lightning.data.questions import Question
from bmoe_lightning.data.tasks.base import Row, Task
from bmoe_lightning.data.tasks.labelled import labelled_question


@dataclass(frozen=True)
class OpenBookQA(Task):
    """Rows with `id`, `question_stem`, `choices` and `answerKey`, or nested as in the original archive."""

    name: str = "openbookqa"
    label: str = "OpenBookQA"
    url: str = "https://huggingface.co/datasets/allenai/openbookqa"
    columns: tuple[str, ...] = ("question_stem", "answerKey")
    hub_id: str = "allenai/openbookqa"
    default_config: str | None = "main"

    def question(self, row: Row, row_id: str) -> Question:  # noqa: ARG002  # rows have ids
        """Turn one row into a question; `Task.question` describes the arguments."""
        return labelled_question(row, "question_stem")
