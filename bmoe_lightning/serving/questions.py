"""Questions to predict, from mappings such as the rows of a file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from bmoe_lightning.data.questions import Question

_COLUMNS = ("question", "choices", "passage", "id", "answer")


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
    missing = [name for name in _COLUMNS[:2] if row.get(name) is None]
    if missing:
        raise ValueError(f"{prefix}: {' and '.join(missing)} missing; found are {sorted(map(str, row))}")
    answer = row.get("answer")
    try:
        found = row.get("id")
        if found is not None and (isinstance(found, bool) or not isinstance(found, (str, int, float))):
            raise TypeError(f"id must be a text or a number, found {type(found).__name__}")
        # The right choice is unknown; no prediction depends on it.
        return Question(
            id=identity if found is None else found if isinstance(found, str) else str(found),
            question=row["question"],
            choices=row["choices"],
            answer=0 if answer is None else answer,
            passage=row.get("passage"),
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{prefix}: {error}") from None
