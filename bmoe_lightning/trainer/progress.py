"""Progress of work outside of the trainer's loops: in its progress bar, or as lines in a log that is no terminal."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

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

    def advance(self, note: str = "") -> None:
        """Count one step, and print a line if the last one is half a minute old.

        Args:
            note: Text at the end of the line.
        """
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
        print(f"{line}, {note}" if note else line, file=sys.stderr, flush=True)


class LoopProgressLines(L.Callback):
    """Prints a line every half minute of the trainer's own loops where stderr is no terminal.

    Lightning's bars show nothing in such a log until a loop ends, or write one long line. Like the bar, the lines are
    left out with `enable_progress_bar=False`, and on ranks other than 0.
    """

    def __init__(self) -> None:
        self._lines: dict[str, ProgressLines] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
        """Begin to count the batches of all epochs."""
        total = math.inf
        if trainer.max_epochs is not None and trainer.max_epochs >= 0:
            total = trainer.num_training_batches * (trainer.max_epochs - trainer.current_epoch)
        self._begin(trainer, "Training", total)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        """Count a batch."""
        self._advance(trainer, "Training")

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
        """Begin to count the batches of all loaders."""
        if not trainer.sanity_checking:
            self._begin(trainer, "Validation", sum(trainer.num_val_batches))

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        """Count a batch."""
        self._advance(trainer, "Validation")

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
        """Begin to count the batches of all loaders."""
        self._begin(trainer, "Testing", sum(trainer.num_test_batches))

    def on_test_batch_end(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        """Count a batch."""
        self._advance(trainer, "Testing")

    def _begin(self, trainer: L.Trainer, description: str, total: float) -> None:
        self._lines.pop(description, None)
        if _is_shown(trainer) and not sys.stderr.isatty():
            self._lines[description] = ProgressLines(description, total)

    def _advance(self, trainer: L.Trainer, description: str) -> None:
        if description in self._lines:
            metrics = trainer.progress_bar_metrics if description == "Training" else {}
            self._lines[description].advance(", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))


def _is_shown(trainer: L.Trainer) -> bool:
    """Whether the trainer's progress bar is shown, on rank 0."""
    bar = trainer.progress_bar_callback
    return bar is not None and trainer.is_global_zero and bool(getattr(bar, "is_enabled", True))


def print_line(trainer: L.Trainer, line: str) -> None:
    """Print a line with a result on stderr, on rank 0; above the trainer's progress bar, if one is shown.

    Args:
        trainer: The trainer.
        line: One line of text.
    """
    if not trainer.is_global_zero:
        return
    bar = trainer.progress_bar_callback if _is_shown(trainer) else None
    if isinstance(bar, RichProgressBar) and bar.progress is not None and sys.stderr.isatty():
        bar.progress.console.print(line, markup=False, highlight=False)
    elif isinstance(bar, TQDMProgressBar) and sys.stderr.isatty():
        from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

        Tqdm.write(line, file=sys.stderr)
    else:
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
    if not _is_shown(trainer):
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
