"""Run a function in a child process, which shares the imported libraries and may be killed."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

_SECONDS = 300


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    Attributes:
        status: Its exit status; the negative number of the signal that killed it.
        text: What it printed, with the traceback of an exception that left it.
        told: What it reported when it ended; empty if it was killed.
    """

    status: int
    text: str
    told: str = ""


def forked(action: Callable[[], int], tell: Callable[[], object] = str, *, seconds: float = _SECONDS) -> Ended:
    """Run a function in a child process, which has Python's own handlers of SIGTERM and SIGINT.

    No backward pass may have run in this process: the threads of autograd are not copied.

    Args:
        action: The function, which returns an exit status.
        tell: Called in the child when the function has ended; its result is `Ended.told` as text.
        seconds: The child is ended after this time, with a traceback of where it was.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    (output, printing), (telling, told) = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(output)
        os.close(telling)
        for descriptor in (1, 2):
            os.dup2(printing, descriptor)
        os.close(printing)
        sys.stdout, sys.stderr = (os.fdopen(os.dup(descriptor), "w", buffering=1) for descriptor in (1, 2))
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        faulthandler.dump_traceback_later(seconds, exit=True)
        _end(action, tell, told)
    os.close(printing)
    os.close(told)
    try:
        with os.fdopen(output, "rb") as pipe, os.fdopen(telling) as report:
            text = pipe.read().decode(errors="replace")
            found = report.read()
    except BaseException:  # a signal to this process
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
    _, status = os.waitpid(pid, 0)
    return Ended(os.waitstatus_to_exitcode(status), text, found)


def _end(action: Callable[[], int], tell: Callable[[], object], told: int) -> NoReturn:
    """Run the function and end this process; whatever it raises is printed."""
    status = 1
    try:
        status = action()
    except SystemExit as stop:
        traceback.print_exc()
        status = stop.code if isinstance(stop.code, int) else 1
    except BaseException:  # noqa: BLE001  # the process ends below
        traceback.print_exc()
    try:
        os.write(told, str(tell()).encode())
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)
