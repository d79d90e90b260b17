"""SIGTERM and SIGINT in a recipe: what is written stays whole, and the exit status tells the signal."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from bmoe_lightning.utils.interruption import SIGINT_STATUS, SIGTERM_STATUS


@contextmanager
def sigterm_exits() -> Iterator[None]:
    """Have SIGTERM raise `SystemExit` with status 143, so that contexts are left in order.

    Within a run of a Lightning trainer the exception is not raised at once: Lightning's handler, which replaces this
    one and calls it, sets `trainer.received_sigterm`, and the trainer stops between two batches. A handler that is set
    already stays; outside of the main thread nothing is set.
    """
    earlier = signal.getsignal(signal.SIGTERM)
    if earlier is not signal.SIG_DFL or threading.current_thread() is not threading.main_thread():
        yield
        return

    def handler(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001
        if signal.getsignal(signal.SIGTERM) is handler:
            raise SystemExit(SIGTERM_STATUS)

    signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, earlier)


def run_until_stopped(action: Callable[[], int], told: str = "") -> int:
    """Run a recipe; returns its exit status, or that of SIGTERM or SIGINT if one stops it.

    Args:
        action: The recipe, which returns its exit status.
        told: What rank zero prints on stderr after the name of the signal: what is stored. Empty prints nothing.
    """
    try:
        with sigterm_exits():
            return action()
    except (KeyboardInterrupt, SystemExit) as stop:
        found = stopping_signal(stop)
        if found is None:
            raise
        name, status = found
        if told and os.environ.get("RANK", "0") == "0":
            print(f"stopped by {name}: {told}", file=sys.stderr)
        return status


def stopping_signal(stop: KeyboardInterrupt | SystemExit) -> tuple[str, int] | None:
    """Name of the signal that an exception comes from, and the exit status; None if it comes from no signal."""
    # Lightning turns KeyboardInterrupt into SystemExit with status 1.
    if isinstance(stop, KeyboardInterrupt) or isinstance(stop.__context__, KeyboardInterrupt):
        return "SIGINT", SIGINT_STATUS
    return ("SIGTERM", SIGTERM_STATUS) if stop.code == SIGTERM_STATUS else None
