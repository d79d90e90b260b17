"""MMLU (Hendrycks et al. 2021, https://arxiv.org/abs/2009.03300): 57 subjects, four choices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bmoe_lightning.data.questions import Question
from bmoe_lightning.data.tasks.base import NumberedRow, Row, Task
from bmoe_lightning.data.tasks.columns import index_column, text_column, texts_column


@dataclass(frozen=True)
class MMLU(Task):
    """Rows with `question`, `subject`, `choices` and the position `answer`, counted from 0.

    `auxiliary_train`, which has questions of other data sets (ARC and OpenBookQA among them) and no subjects, is the
    training split; `dev`, five questions a subject for few-shot prompts, is not read. The configuration `all` has every
    split. The one of a subject (`cais/mmlu:anatomy`) has no training split, so it can be evaluated on, but not trained
    on.

    Attributes:
        subjects: Subjects to read from the configuration `all`, such as `("high_school_physics", "astronomy")`; empty
            for every subject. Rows whose subject is empty, those of `auxiliary_train`, are always read.
    """

    name: str = "mmlu"
    label: str = "MMLU"
    url: str = "https://huggingface.co/datasets/cais/mmlu"
    columns: tuple[str, ...] = ("question", "subject", "choices", "answer")
    hub_id: str = "cais/mmlu"
    default_config: str | None = "all"
    train_splits: tuple[str, ...] = ("auxiliary_train", "train")
    validation_splits: tuple[str, ...] = ("validation", "valid", "val")
    subjects: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        given: object = self.subjects
        # One string is a sequence too, of one subject a character.
        if isinstance(given, str):
            raise TypeError(f"subjects must be a tuple of names, found {given!r}; write ({given!r},)")
        object.__setattr__(self, "subjects", tuple(self.subjects))

    def question(self, row: Row, row_id: str) -> Question:
        """Turn one row into a question; `Task.question` describes the arguments."""
        choices = texts_column(row, "choices")
        if len(choices) != 4:
            raise ValueError(f"choices must be four texts, found {list(choices)}")
        return Question(row_id, text_column(row, "question"), choices, index_column(row, "answer", len(choices)))

    def select(self, rows: Iterator[NumberedRow]) -> Iterator[NumberedRow]:
        """The rows of `subjects`; `Task.select` describes the arguments.

        Raises:
            ValueError: If a row has no column `subject`, or a subject is not in the data.
        """
        if not self.subjects:
            yield from rows
            return
        found: set[str] = set()
        for where, row in rows:
            subject = row.get("subject")
            if not isinstance(subject, str):
                raise ValueError(f"{where}: subject must be a text, found {subject!r}")
            found.add(subject)
            if subject in ("", *self.subjects):
                yield where, row
        absent = [subject for subject in self.subjects if subject not in found]
        if absent and found - {""}:
            raise ValueError(f"no row has the subject {absent[0]!r}; the subjects are {', '.join(sorted(found))}")
