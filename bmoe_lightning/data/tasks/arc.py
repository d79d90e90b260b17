"""ARC (Clark et al. 2018, https://arxiv.org/abs/1803.05457): school science, 3 to 5 choices."""

from __future__ import annotations

from dataclasses import dataclass

from bmoe_lightning.data.questions import Question
from bmoe_lightning.data.tasks.base import Row, Task
from bmoe_lightning.data.tasks.labelled import labelled_question


@dataclass(frozen=True)
class ARC(Task):
    """Rows with `id`, `question`, `choices` and `answerKey`, or nested as in the original archive."""

    name: str = "arc"
    label: str = "ARC"
    url: str = "https://huggingface.co/datasets/allenai/ai2_arc"
    columns: tuple[str, ...] = ("question", "answerKey")
    hub_id: str = "allenai/ai2_arc"
    configs: tuple[str, ...] = ("ARC-Easy", "ARC-Challenge")

    def question(self, row: Row, row_id: str) -> Question:  # noqa: ARG002  # rows have ids
        """Turn one row into a question; `Task.question` describes the arguments."""
        return labelled_question(row, "question")
