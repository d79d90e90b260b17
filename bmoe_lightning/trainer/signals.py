"""SIGTERM and SIGINT in passes over data that run outside of Lightning's loops.

While a trainer runs, Lightning's handler of SIGTERM only sets `trainer.received_sigterm`, beside the handler that the
user or SLURM had before, and Lightning's loops poll it between batches. Passes of this package poll it in the same way.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import lightning as L
from lightning.pytorch.utilities.exceptions import SIGTERMException

from bmoe_lightning.trainer.earlier_run import has_stored_sums
from bmoe_lightning.utils.interruption import SIGTERM_STATUS

_logger = logging.getLogger(__name__)


def check_sigterm(trainer: L.Trainer) -> None:
    """Stop the process if the trainer has received SIGTERM.

    Raises:
        SIGTERMException: With exit status 143.
    """
    if trainer.received_sigterm:
        raise SIGTERMException(SIGTERM_STATUS)


def set_exit_status(exception: BaseException) -> None:
    """Set the exit status of a `SIGTERMException` of Lightning's loops, which have none, so that it is not 0."""
    if isinstance(exception, SIGTERMException) and exception.code is None:
        exception.code = SIGTERM_STATUS


@contextmanager
def deferred_sigint() -> Iterator[Callable[[], None]]:
    """Defer Ctrl-C to the next call of the yielded function; a second Ctrl-C is not deferred.

    Only Python's own handler is replaced, and only in the main thread.
    """
    default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not default or threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    received: list[int] = []

    def defer(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        if len(received) > 1:
            signal.default_int_handler(signum, frame)

    def check() -> None:
        if received:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, defer)
    try:
        yield check
    finally:
        if signal.getsignal(signal.SIGINT) is defer:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def report_stop(exception: BaseException, folder: Path | None, *, evaluates: bool = False) -> None:
    """Log one sentence if a signal stopped the trainer, and set the exit status; see `set_exit_status`.

    Args:
        exception: What ended the run.
        folder: Folder of the fit and of the checkpoints of curvature passes.
        evaluates: Whether an evaluation or a prediction ended, which leaves the fit as it was.
    """
    set_exit_status(exception)
    name = {SIGTERMException: "SIGTERM", KeyboardInterrupt: "SIGINT"}.get(type(exception))
    if name is None:
        return
    if evaluates:
        _logger.warning("stopped by %s; the fit is as it was (%s): run the evaluation again", name, folder)
        return
    if folder is not None and has_stored_sums(folder):
        remedy = (
            f"the sums of the curvature pass are stored in {folder}; fit_posterior, or trainer.fit with the last "
            "checkpoint in ckpt_path=, resumes from them"
        )
    else:
        remedy = (
            "call fit_posterior on the trained weights, or resume training; a curvature pass can be resumed with "
            "curvature_checkpoint_every=N"
        )
    _logger.warning("stopped by %s before all methods were fitted and evaluated; %s", name, remedy)
