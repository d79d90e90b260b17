"""Progress of the steps of a loop: a bar, or lines in a log that is no terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm

from bmoe_lightning.trainer.progress import ProgressLines


@contextmanager
def step_progress(description: str, total: int, *, shown: bool) -> Iterator[Callable[[str], None]]:
    """Show the progress of steps on stderr.

    Args:
        description: What is in progress.
        total: Planned number of steps.
        shown: Whether to show anything.

    Yields:
        A function to call after each step, with a text for the end of the line.
    """
    if shown and not sys.stderr.isatty():
        yield ProgressLines(description, total).advance
        return
    with tqdm(total=total, desc=description, unit="step", disable=not shown) as bar:

        def advance(note: str = "") -> None:
            bar.total = max(bar.n + 1, total)
            bar.set_postfix_str(note, refresh=False)
            bar.update()

        yield advance
