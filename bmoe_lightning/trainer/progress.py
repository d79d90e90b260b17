"""Progress of work outside of the trainer's loops: in its progress bar, or as lines in a log that is no terminal."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

_INTERVAL = 30.0  # seconds


class ProgressLines:
    """Prints a line on stderr every half minute, for log files that show no progress bar.

    Args:
        description: What is in progress.
        total: Number of steps; infinity if it is unknown.
    """

    def __init__(self, description: str, total: float) -> None:
        self._description = description
        self._total = total
        self._done = 0
        self._started = self._printed = time.monotonic()

    def advance(self) -> None:
        """Count one step, and print a line if the last one is half a minute old."""
        self._done += 1
        now = time.monotonic()
        if now - self._printed < _INTERVAL:
            return
        self._printed = now
        elapsed = now - self._started
        line = f"{self._description}: {self._done}"
        if math.isfinite(self._total):
            left = elapsed / self._done * max(self._total - self._done, 0)
            line += f"/{int(self._total)}, {_minutes(elapsed)} elapsed, {_minutes(left)} left"
        else:
            line += f", {_minutes(elapsed)} elapsed"
        print(line, file=sys.stderr, flush=True)


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


@contextmanager
def progress(
    trainer: L.Trainer, total: float, description: str, *, transient: bool = False
) -> Iterator[Callable[[], None]]:
    """Show progress in the trainer's bar; silent without a supported bar, and on ranks other than 0.

    Where stderr is no terminal, a line is printed every half minute; tqdm then shows no bar.

    Args:
        trainer: The trainer.
        total: Number of steps; infinite where it is unknown.
        description: Text beside the bar.
        transient: Whether the bar is removed afterwards.

    Yields:
        A function to call after each step.
    """
    bar = trainer.progress_bar_callback
    steps = None if math.isinf(total) else int(total)
    if bar is None or not trainer.is_global_zero or not getattr(bar, "is_enabled", True):
        yield lambda: None
    elif isinstance(bar, RichProgressBar) and bar.progress is not None:
        rich = bar.progress
        task = rich.add_task(description, total=steps)
        lines = None if sys.stderr.isatty() else ProgressLines(description, total)

        def advance() -> None:
            rich.update(task, advance=1, refresh=True)
            if lines is not None:
                lines.advance()

        try:
            yield advance
        finally:
            if transient:
                rich.remove_task(task)
    elif isinstance(bar, TQDMProgressBar) and not sys.stderr.isatty():
        yield ProgressLines(description, total).advance
    elif isinstance(bar, TQDMProgressBar):
        from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

        with Tqdm(total=steps, desc=description, leave=not transient, dynamic_ncols=True) as tqdm:
            yield lambda: tqdm.update(1) and None
    else:
        yield lambda: None
