"""Faults that a process injects into itself: a kill, a full disk, a signal, a user who may not write."""

from __future__ import annotations

import errno
import os
import pkgutil
import resource
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink", "os.utime"}
_GROWS = {"create", "os.mkdir", "os.link", "os.symlink"}  # what needs space
_NOBODY = 65534

Inject = Callable[[Path], Callable[[], object]]
"""Called with the folder of the run in the process that will have the fault; returns what this reports at its end."""


def _nothing() -> str:
    return ""


def no_fault(folder: Path) -> Callable[[], object]:
    """Count the file operations that change a folder; the process reports their number."""
    seen: list[str] = []
    _at_operations(folder, lambda event, _: seen.append(event))
    return lambda: len(seen)


def kill_at_operation(number: int) -> Inject:
    """Kill the process before a file operation that changes the folder.

    Args:
        number: Number of operations that are done before.
    """

    def inject(folder: Path) -> Callable[[], object]:
        seen: list[str] = []

        def before(event: str, path: str) -> None:  # noqa: ARG001
            if len(seen) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            seen.append(event)

        _at_operations(folder, before)
        return lambda: len(seen)

    return inject


def kill_after(seconds: float) -> Inject:
    """Kill the process some seconds after it begins."""

    def inject(folder: Path) -> Callable[[], object]:  # noqa: ARG001
        timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()
        return _nothing

    return inject


def full_at_operation(number: int) -> Inject:
    """Have a disk that is full from a file operation on: whatever needs space there fails.

    The process reports how many operations have failed.

    Args:
        number: Number of operations that are done before.
    """

    def inject(folder: Path) -> Callable[[], object]:
        seen: list[str] = []
        refused: list[str] = []

        def before(event: str, path: str) -> None:
            seen.append(event)
            if len(seen) > number and event in _GROWS:
                refused.append(event)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

        _at_operations(folder, before)
        return lambda: len(refused)

    return inject


def largest_file(num_bytes: int) -> Inject:
    """Have the system refuse to write more than some bytes into a file, whatever library writes it.

    The process reports how many writes have failed; of several at once it may count one.

    Args:
        num_bytes: The largest size.
    """

    def inject(folder: Path) -> Callable[[], object]:  # noqa: ARG001
        refused: list[int] = []
        # The system also sends a signal, which Python ignores; the write fails all the same with a handler.
        signal.signal(signal.SIGXFSZ, lambda number, _: refused.append(number))
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))
        return lambda: len(refused)

    return inject


def signal_in(target: str, call: int, number: int) -> Inject:
    """Send the process a signal in a call of a function.

    Args:
        target: Dotted name of the function.
        call: Which of its calls, from 1.
        number: The signal.
    """

    def inject(folder: Path) -> Callable[[], object]:  # noqa: ARG001
        place, _, name = target.rpartition(".")
        original: Callable[..., Any] = getattr(pkgutil.resolve_name(place), name)
        calls: list[int] = []

        def wrapped(*args: Any, **options: Any) -> Any:
            calls.append(0)
            if len(calls) == call:
                os.kill(os.getpid(), number)
            return original(*args, **options)

        mock.patch(target, wrapped).start()
        return _nothing

    return inject


def unprivileged(folder: Path) -> Callable[[], object]:  # noqa: ARG001
    """Run as a user for whom permissions count: the superuser may write everywhere."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(_NOBODY)
        os.setuid(_NOBODY)
    return _nothing


def give_away(folder: Path) -> None:
    """Give a folder and its content to the user of `unprivileged`."""
    if os.geteuid() == 0:
        for path in (folder, *folder.rglob("*")):
            os.chown(path, _NOBODY, _NOBODY, follow_symlinks=False)


def _at_operations(folder: Path, before: Callable[[str, str], None]) -> None:
    """Call a function before every file operation of this process that changes a folder, or one whose name begins so.

    Args:
        folder: The folder.
        before: Function of the audit event and the path; what it raises, the operation raises.
    """
    inside = str(folder)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            flags = args[2] if isinstance(args[2], int) else 0
            changes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            event = "create" if flags & os.O_CREAT else event
        else:
            changes = event in _CHANGES
        if changes and isinstance(args[0], (str, bytes, os.PathLike)):
            path = os.fsdecode(args[0])
            if path.startswith(inside):
                before(event, path)

    sys.addaudithook(hook)
