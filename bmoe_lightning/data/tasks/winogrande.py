"""Winogrande (Sakaguchi et al. 2020, https://arxiv.org/abs/1907.10641): which of two words fills the blank."""

from __future__ import annotations

from dataclasses import dataclass

from bmoe_lightning.data.questions import Question
from bmoe_lightning.data.tasks.base import Row, Task
from bmoe_lightning.data.tasks.columns import text_column
from bmoe_lightning.data.tasks.labelled import label_position
from bmoe_lightning.utils.messages import shown


@dataclass(frozen=True)
class Winogrande(Task):
    """Rows with `sentence`, `option1`, `option2` and the text `answer`, `1` or `2`.

    The answers of the test split are hidden, so the validation split is reported, and a part of train is set aside. The
    training sets are nested: each configuration from `xs` to `xl` contains the one before.
    """

    name: str = "winogrande"
    label: str = "Winogrande"
    url: str = "https://huggingface.co/datasets/allenai/winogrande"
    columns: tuple[str, ...] = ("sentence", "option1", "option2", "answer")
    hub_id: str = "allenai/winogrande"
    configs: tuple[str, ...] = ("winogrande_xs", "winogrande_s", "winogrande_m", "winogrande_l", "winogrande_xl")
    validation_splits: tuple[str, ...] = ()
    test_splits: tuple[str, ...] = ("validation", "valid", "val", "dev")

    def question(self, row: Row, row_id: str) -> Question:
        """Turn one row into a question; `Task.question` describes the arguments."""
        sentence = text_column(row, "sentence")
        if "_" not in sentence:
            raise ValueError(f"sentence has no blank (_): {shown(sentence)}")
        options = (text_column(row, "option1"), text_column(row, "option2"))
        return Question(row_id, sentence, options, label_position(row, "answer", ("1", "2")))
