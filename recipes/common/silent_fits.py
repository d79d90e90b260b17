"""Fits whose warnings nobody needs."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def silent_fits() -> Iterator[None]:
    """Without the warnings of fits: those to random weights, or those that have been given already."""
    log = logging.getLogger("bmoe_lightning")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
