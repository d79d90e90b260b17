"""Progress of work outside of the trainer's loops, in the trainer's progress bar."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar


@contextmanager
def progress(
    trainer: L.Trainer, total: float, description: str, *, transient: bool = False
) -> Iterator[Callable[[], None]]:
    """Show progress in the trainer's bar; silent without a supported bar, and on ranks other than 0.

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
        try:
            yield lambda: rich.update(task, advance=1, refresh=True)
        finally:
            if transient:
                rich.remove_task(task)
    elif isinstance(bar, TQDMProgressBar):
        from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

        with Tqdm(total=steps, desc=description, leave=not transient, dynamic_ncols=True) as tqdm:
            yield lambda: tqdm.update(1) and None
    else:
        yield lambda: None
