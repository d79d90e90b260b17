"""MMLU (Hendrycks et al. 2021, https://arxiv.org/abs/2009.03300): 57 subjects, four choices."""

from __future__ import annotations

from dataclasses import dataclass

from bmoe_lightning.data.questions import Question
from bmoe_lightning.data.tasks.base import Row
from bmoe_lightning.data.tasks.columns import index_column, text_column, texts_column
from bmoe_lightning.data.tasks.subjects import SubjectTask
from bmoe_lightning.utils.messages import shown


@dataclass(frozen=True)
class MMLU(SubjectTask):
    """Rows with `question`, `subject`, `choices` and the position `answer`, counted from 0.

    `auxiliary_train`, which has questions of other data sets (ARC and OpenBookQA among them) and no subjects, is the
    training split; `dev`, five questions a subject for few-shot prompts, is not read. The configuration `all` has every
    split. The one of a subject (`cais/mmlu:anatomy`) has no training split, so it can be evaluated on, but not trained
    on. The rows of `auxiliary_train` have an empty subject, and are read whatever `subjects` are.
    """

    name: str = "mmlu"
    label: str = "MMLU"
    url: str = "https://huggingface.co/datasets/cais/mmlu"
    columns: tuple[str, ...] = ("question", "subject", "choices", "answer")
    hub_id: str = "cais/mmlu"
    default_config: str | None = "all"
    train_splits: tuple[str, ...] = ("auxiliary_train", "train")
    validation_splits: tuple[str, ...] = ("validation", "valid", "val")

    def question(self, row: Row, row_id: str) -> Question:
        """Turn one row into a question; `Task.question` describes the arguments."""
        choices = texts_column(row, "choices")
        if len(choices) != 4:
            raise ValueError(f"choices must be four texts, found {shown(list(choices))}")
        return Question(row_id, text_column(row, "question"), choices, index_column(row, "answer", len(choices)))
