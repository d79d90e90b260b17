"""Questions to predict, from mappings such as the rows of a file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from bmoe_lightning.data.questions import Question
from bmoe_lightning.data.tasks.columns import list_of, present, text_column
from bmoe_lightning.utils.messages import described


def as_questions(given: Iterable[Question | Mapping[str, Any]]) -> Iterator[Question]:
    """Questions from mappings with `question` and `choices`, and maybe `passage`, `id` and `answer`.

    Args:
        given: Questions, or mappings. `choices` are texts in the order of their letters. A question without an id has
            its number, counted from 0; `answer`, the position of the right choice, is not needed for predictions.

    Raises:
        ValueError: While iterating, if one is malformed; the message names it.
    """
    for number, entry in enumerate(given):
        yield entry if isinstance(entry, Question) else question_of(entry, str(number))


def labelled_questions(given: Iterable[Question | Mapping[str, Any]]) -> Iterator[Question]:
    """Questions whose right choice is known; as `as_questions`.

    Args:
        given: Questions, or mappings with `answer` besides.

    Raises:
        ValueError: While iterating, if one is malformed or has no answer; the message names it.
    """
    for number, entry in enumerate(given):
        if isinstance(entry, Mapping) and entry.get("answer") is None:
            raise ValueError(f"question {entry.get('id', number)} has no answer; give the position of the right choice")
        yield entry if isinstance(entry, Question) else question_of(entry, str(number))


def question_of(row: Mapping[str, Any], identity: str, where: str = "") -> Question:
    """The question of a mapping; see `as_questions`.

    Args:
        row: The mapping.
        identity: Id of a question without one.
        where: Where the mapping is from; the message of an error begins with it.

    Raises:
        ValueError: If it is malformed.
    """
    prefix = where or f"question {identity}"
    if not isinstance(row, Mapping):
        raise ValueError(f"{prefix}: a {type(row).__name__}; give a Question, or a mapping with question and choices")
    try:
        # The right choice may be unknown; no prediction depends on it.
        answer, passage = row.get("answer"), row.get("passage")
        return Question(
            id=_identity(row.get("id"), identity),
            question=text_column(row, "question"),
            choices=tuple(list_of(present(row, "choices"), "choices")),
            answer=0 if answer is None else answer,
            passage=None if passage is None else text_column(row, "passage"),
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{prefix}: {error}") from None


def _identity(found: object, otherwise: str) -> str:
    if found is None:
        return otherwise
    if isinstance(found, bool) or not isinstance(found, (str, int, float)):
        raise TypeError(f"id must be a text or a number, found {described(found)}")
    return str(found)
