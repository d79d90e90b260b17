"""Reading single columns of a row, each refused with its name where it is not what a task expects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bmoe_lightning.data.questions import is_blank, is_encodable
from bmoe_lightning.data.tasks.base import Row
from bmoe_lightning.utils.messages import described, shown


def text_column(row: Row, column: str) -> str:
    """A text that is not empty.

    Args:
        row: Columns by name.
        column: Which one.

    Raises:
        ValueError: If the column is missing, empty, or no text.
    """
    value = present(row, column)
    if not isinstance(value, str):
        raise ValueError(f"{column} must be a text, found {described(value)}")
    return _checked(value, column)


def id_column(row: Row, column: str = "id") -> str:
    """An id: a text or an integer.

    Args:
        row: Columns by name.
        column: Which one.

    Raises:
        ValueError: If the column is missing, empty, or neither text nor integer.
    """
    value = present(row, column)
    name_of(value, column)
    return str(value)


def index_column(row: Row, column: str, size: int) -> int:
    """The position of the answer, counted from 0.

    Args:
        row: Columns by name.
        column: Which one.
        size: Number of choices.

    Raises:
        ValueError: If the column is missing, no integer, or not below `size`.
    """
    value = present(row, column)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < size:
        raise ValueError(f"{column} must be an integer from 0 to {size - 1}, found {described(value)}")
    return value


def bool_column(row: Row, column: str) -> bool:
    """True or false.

    Args:
        row: Columns by name.
        column: Which one.

    Raises:
        ValueError: If the column is missing, or no boolean.
    """
    value = present(row, column)
    if not isinstance(value, bool):
        raise ValueError(f"{column} must be true or false, found {described(value)}")
    return value


def texts_column(row: Row, column: str) -> tuple[str, ...]:
    """A list of texts, such as the choices.

    Args:
        row: Columns by name.
        column: Which one.

    Raises:
        ValueError: If the column is missing, empty, or no list of texts.
    """
    return texts_of(present(row, column), column)


def present(row: Row, column: str) -> Any:
    """What a column holds.

    Args:
        row: Columns by name.
        column: Which one.

    Raises:
        ValueError: If the column is missing or null.
    """
    if column not in row:
        raise ValueError(f"{column} missing; the columns found are {shown(sorted(map(str, row)))}")
    if row[column] is None:
        raise ValueError(f"{column} is null; give a value, or drop the row")
    return row[column]


def name_of(value: object, column: str) -> str:
    """An id or a label as text, without surrounding white space.

    Args:
        value: A text or an integer.
        column: Where it stands, for messages.

    Raises:
        ValueError: If it is neither, or empty.
    """
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"{column} must be a text or an integer, found {described(value)}")
    return _checked(str(value), column).strip()


def list_of(value: object, column: str) -> Sequence[Any]:
    """A list that is not empty.

    Args:
        value: What is to be one.
        column: Where it stands, for messages.

    Raises:
        ValueError: If it is empty or something else, a text for example.
    """
    # A string is a sequence too, and would pass as one choice a character.
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ValueError(f"{column} must be a list, found {described(value)}")
    if not value:
        raise ValueError(f"{column} is empty")
    return value


def texts_of(value: object, column: str) -> tuple[str, ...]:
    """A list of texts that is not empty.

    Args:
        value: What is to be one.
        column: Where it stands, for messages.

    Raises:
        ValueError: If it is empty or something else.
    """
    texts = list_of(value, column)
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"{column} must be a list of texts, found {described(text)} among them")
    return tuple(texts)


def _checked(text: str, column: str) -> str:
    if is_blank(text):
        raise ValueError(f"{column} is empty")
    if not is_encodable(text):
        raise ValueError(f"{column} is not valid Unicode")
    return text
