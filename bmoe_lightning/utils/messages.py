"""Parts of error messages."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path

_SHORT = reprlib.Repr()
_SHORT.maxlevel = 3
_SHORT.maxlist = _SHORT.maxtuple = 26
_SHORT.maxdict = 8
_SHORT.maxstring = _SHORT.maxother = 100
# In the words of JSON and parquet; a bool is an int too, so it goes first.
_KINDS: dict[type | tuple[type, ...], str] = {
    bool: "the boolean",
    str: "the text",
    (int, float): "the number",
    (list, tuple): "the list",
    Mapping: "the object",
}


def first_names(names: Iterable[str], count: int = 3) -> str:
    """The first few of many names in alphabetical order, `none` if there are none.

    Args:
        names: All names.
        count: Number of names to list.
    """
    ordered = sorted(names)
    more = f" and {len(ordered) - count} more" if len(ordered) > count else ""
    return (", ".join(ordered[:count]) or "none") + more


def numbered(names: Mapping[int, str], count: int = 4) -> str:
    """The first few of many names with their numbers and the last one, such as `0 is a, 1 is b ... 7 is h`.

    Args:
        names: Names by number, at least one.
        count: Number of names to list.
    """
    entries = [f"{number} is {name}" for number, name in names.items()]
    if len(entries) <= count:
        return ", ".join(entries)
    return f"{', '.join(entries[: count - 1])} ... {entries[-1]}"


def shown_path(path: str | Path, limit: int = 300) -> str:
    """A path for a message, which may come from a damaged file: printable, and not too long.

    Args:
        path: Any path.
        limit: Number of characters.
    """
    text = str(path) if str(path).isprintable() else repr(str(path))
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def shown(value: object, limit: int = 300) -> str:
    """A value of the user's data for a message: its `repr`, shortened where it is long or deeply nested.

    Args:
        value: Any value.
        limit: Number of characters.
    """
    text = _SHORT.repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def described(value: object) -> str:
    """A value of a file for a message, with its kind: `the text 'abcd'`, `the number 3`, `null`; shortened.

    Args:
        value: Any value.
    """
    if value is None:
        return "null"
    for kinds, name in _KINDS.items():
        if isinstance(value, kinds):
            return f"{name} {shown(value)}"
    return f"{type(value).__name__} {shown(value)}"


def first_line(error: BaseException) -> str:
    """The first line of an exception's message without its full stop, or its class if there is no message."""
    return str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
