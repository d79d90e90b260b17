"""Warnings of a fit: what makes a fitted number doubtful, in one sentence each.

Whatever fits a number calls `warn_of_fit`. Within `collected_fit_warnings`, as in `fit_methods`, the sentences are
collected, so that they are stored with the fit and shown with the results; elsewhere each is a Python warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar


class FitWarning(UserWarning):
    """A fitted number is at a bound, not determined by the data, or otherwise doubtful."""


_collected: ContextVar[list[str] | None] = ContextVar("fit_warnings", default=None)


def warn_of_fit(sentence: str, *, stacklevel: int = 1) -> None:
    """Warn that a fitted number is doubtful.

    Args:
        sentence: What was found and what to do, in one line of text. It is shown below the results table.
        stacklevel: As of `warnings.warn`: 1 is the caller.
    """
    line = " ".join(sentence.split())
    if not line:
        raise ValueError("a warning of a fit must say what was found; pass a sentence")
    collected = _collected.get()
    if collected is None:
        warnings.warn(line, FitWarning, stacklevel=stacklevel + 1)
    elif line not in collected:
        collected.append(line)


@contextmanager
def collected_fit_warnings() -> Iterator[list[str]]:
    """Collect the warnings of a fit in this thread instead of issuing them; blocks may be nested.

    Yields:
        The distinct sentences so far, in order; it grows.
    """
    sentences: list[str] = []
    token = _collected.set(sentences)
    try:
        yield sentences
    finally:
        _collected.reset(token)
