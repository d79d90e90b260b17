"""Rows with labelled choices whose answer is a label: the format of AI2's data sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bmoe_lightning.data.questions import Question
from bmoe_lightning.data.tasks.base import Row
from bmoe_lightning.data.tasks.columns import id_column, list_of, name_of, present, text_column, texts_of
from bmoe_lightning.utils.messages import described, shown


def labelled_question(row: Row, column: str) -> Question:
    """The question of a row in the columns of AI2's data sets.

    Args:
        row: Row with `id`, the question, `choices` (`text` and `label`) and `answerKey`. The original archives nest the
            question as `question: {stem, choices: [{text, label}]}`.
        column: Name of the column with the question's text.

    Raises:
        ValueError: If the row is malformed.
    """
    identity = id_column(row)
    flat: Mapping[str, Any] = row
    nested = row.get("question")
    if isinstance(nested, Mapping):
        inner = {column: nested.get("stem"), "choices": nested.get("choices")}
        for name in inner.keys() - {"question"}:
            if row.get(name) not in (None, inner[name]):
                raise ValueError(f"{name} stands beside the nested question too, and differs; leave out one of the two")
        flat = {name: value for name, value in {**row, **inner}.items() if value is not None or name not in inner}
    text = text_column(flat, column)
    texts, labels = labelled_choices(present(flat, "choices"))
    return Question(id=identity, question=text, choices=texts, answer=label_position(row, "answerKey", labels))


def labelled_choices(choices: object, column: str = "choices") -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Texts and labels of choices, either a mapping of two lists or a list of mappings, with `text` and `label`.

    Args:
        choices: Value of the column.
        column: Name of the column, for error messages.

    Returns:
        `(texts, labels)`, of equal length; labels are texts without surrounding white space.

    Raises:
        ValueError: If it is neither layout, or the labels are not all different.
    """
    try:
        if isinstance(choices, Mapping):
            texts, labels = choices["text"], choices["label"]
        else:
            texts, labels = [c["text"] for c in choices], [c["label"] for c in choices]  # type: ignore[attr-defined]
    except (KeyError, TypeError):
        raise ValueError(
            f"{column} must hold 'text' and 'label', as two lists or as a list of pairs; found {described(choices)}"
        ) from None
    texts, labels = texts_of(texts, f"text of {column}"), _labels(labels, f"label of {column}")
    if len(texts) != len(labels):
        raise ValueError(f"{column} has {len(texts)} texts but {len(labels)} labels")
    if len(set(labels)) != len(labels):
        raise ValueError(f"the labels {shown(list(labels))} of {column} are not all different")
    return texts, labels


def label_position(row: Row, column: str, labels: Sequence[str]) -> int:
    """Position of the answer's label among the row's labels.

    It is looked up, not computed from the label's character code: ARC has questions labelled 1 to 4, and questions with
    3 or 5 choices.

    Args:
        row: Columns by name.
        column: The column of the answer's label, a text or an integer.
        labels: Labels of the choices.

    Raises:
        ValueError: If the column is missing, empty, or not one of the labels.
    """
    if column not in row:
        present(row, column)  # raises, and names the columns found
    value = row[column]
    if value is None or (isinstance(value, str) and not value.strip()):
        raise ValueError(f"{column} is empty; use a split whose answers are public")
    key = name_of(value, column)
    if key not in labels:
        raise ValueError(f"{column} {shown(key)} is none of the labels {shown(list(labels))}")
    return list(labels).index(key)


def _labels(value: object, column: str) -> tuple[str, ...]:
    return tuple(name_of(label, column) for label in list_of(value, column))
