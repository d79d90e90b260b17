"""Trials: inject a fault into a run, run the same command again, and compare with a run without faults."""

from __future__ import annotations

import random
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from recipes.faults.forked import Ended
from recipes.faults.injections import (
    Inject,
    full_at_operation,
    give_away,
    kill_after,
    kill_at_operation,
    largest_file,
    signal_in,
    unprivileged,
)
from recipes.faults.outcomes import Outcome
from recipes.faults.subjects import Subject

Step = Callable[[str], None]
"""Called after each trial, with a text for the progress."""

_END = 400  # characters of a process's output that a fault shows


class UndisturbedError(RuntimeError):
    """A run without faults failed; the message has the end of its output."""


@dataclass(frozen=True)
class Undisturbed:
    """A run without faults.

    Attributes:
        subject: The command.
        folder: Its folder.
        operations: Number of file operations that change it.
        seconds: How long it took.
        content: Digests of what it computed.
    """

    subject: Subject
    folder: Path
    operations: int
    seconds: float
    content: dict[str, str]


def undisturbed(subject: Subject, folder: Path) -> Undisturbed:
    """Run a command without faults.

    Args:
        subject: The command.
        folder: Folder of the run, replaced if it is there.

    Raises:
        UndisturbedError: If it fails.
    """
    subject.remove(folder)
    started = time.monotonic()
    ended = subject.run(folder)
    if ended.status != 0:
        raise UndisturbedError(f"the {subject.name} fails without a fault (status {ended.status}): {end_of(ended)}")
    seconds = time.monotonic() - started
    return Undisturbed(subject, folder, int(ended.told), seconds, subject.content(folder))


def killed(run: Undisturbed, count: int, rng: random.Random, advance: Step) -> Iterator[Outcome]:
    """Kill runs: half before file operations that are evenly spaced, half at random times.

    Args:
        run: The run without faults.
        count: Number of kills.
        rng: Source of the times.
        advance: Called after each.
    """
    at_operations, at_times = count - count // 2, count // 2
    places = [int((number + rng.random()) * run.operations / at_operations) for number in range(at_operations)]
    kinds = {
        "before a file operation": [kill_at_operation(place) for place in places],
        "at a random time": [kill_after(rng.uniform(0, run.seconds)) for _ in range(at_times)],
    }
    for kind, injections in kinds.items():
        outcome = Outcome(f"{run.subject.name} killed {kind}")
        for number, inject in enumerate(injections):
            outcome.add("finished", trial(run, inject, lambda _: ""))
            advance(f"{number + 1} of {len(injections)} {kind}")
        yield outcome


def full_disks(run: Undisturbed, count: int, rng: random.Random, advance: Step) -> Iterator[Outcome]:
    """Have the disk become full at file operations, and bound the size of files; arguments are those of `killed`."""
    at_operations, by_size = count - count // 2, count // 2
    sizes = sorted({path.stat().st_size for path in run.folder.rglob("*") if path.is_file()})
    places = [int((number + rng.random()) * run.operations / at_operations) for number in range(at_operations)]
    kinds = {
        "on a disk that becomes full": [full_at_operation(place) for place in places],
        "whose files may not grow": [largest_file(rng.choice(sizes[:-1]) + 1) for _ in range(by_size)],
    }
    for kind, injections in kinds.items():
        outcome = Outcome(f"{run.subject.name} {kind}")
        for number, inject in enumerate(injections):
            outcome.add("finished", trial(run, inject, partial(_untold, run.subject)))
            advance(f"{number + 1} of {len(injections)} {kind}")
        yield outcome


def read_only_folders(run: Undisturbed, count: int, rng: random.Random, advance: Step) -> Iterator[Outcome]:
    """Take the permission to write from folders of runs that were killed; arguments are those of `killed`."""
    outcome = Outcome(f"{run.subject.name} with a folder that cannot be written to")
    for number in range(count):
        # Not in the output folder, which another user may not be allowed to enter.
        with tempfile.TemporaryDirectory() as parent:
            outcome.add("finished", _with_locked_folder(run, Path(parent).resolve(), rng))
        advance(f"{number + 1} of {count} folders")
    yield outcome


def _with_locked_folder(run: Undisturbed, parent: Path, rng: random.Random) -> str:
    folder = parent / "run"
    folder.mkdir()
    parent.chmod(0o755)
    run.subject.run(folder, kill_at_operation(rng.randrange(run.operations // 4, run.operations)))
    give_away(parent)
    locked = rng.choice(sorted(path for path in (folder, *folder.rglob("*")) if path.is_dir()))
    locked.chmod(0o555)
    ended = run.subject.run(folder, unprivileged)
    locked.chmod(0o755)
    fault = _untold(run.subject, ended) or _repeated(run, folder, ended)
    return f"{locked.relative_to(parent)}: {fault}" if fault else ""


def signalled(run: Undisturbed, most: int | None, advance: Step) -> Iterator[Outcome]:
    """Send SIGTERM and SIGINT in each stage of a run.

    Args:
        run: The run without faults.
        most: Number of signals; None for all.
        advance: Called after each.
    """
    cases = [(number, stage) for number in (signal.SIGTERM, signal.SIGINT) for stage in run.subject.stages]
    outcomes = {number: Outcome(f"{run.subject.name} stopped by {number.name}") for number, _ in cases}
    for number, stage in cases[:most]:
        inject = signal_in(*run.subject.stages[stage], number)
        fault = trial(run, inject, partial(_unstopped, run, number))
        outcomes[number].add("finished", f"in {stage}: {fault}" if fault else "")
        advance(f"{number.name} in {stage}")
    yield from (outcome for outcome in outcomes.values() if outcome.tried)


def trial(run: Undisturbed, inject: Inject, complaint: Callable[[Ended], str]) -> str:
    """Run a command with a fault, then without one, and compare.

    Args:
        run: The run without faults.
        inject: The fault.
        complaint: What is wrong with the end of the run that had the fault; empty if nothing is.

    Returns:
        What was not handled; empty if all was.
    """
    folder = run.folder.with_name("trial")
    run.subject.remove(folder)
    ended = run.subject.run(folder, inject)
    fault = complaint(ended) or _repeated(run, folder, ended)
    run.subject.remove(folder)
    return fault


def _repeated(run: Undisturbed, folder: Path, ended: Ended) -> str:
    """What the same command does not put right; also what a run that did not notice its fault has computed."""
    if ended.status == 0 and (wrong := run.subject.differences(folder, run.content)):
        return f"ends with status 0 and other numbers or files: {wrong[:5]}"
    again = run.subject.run(folder)
    if again.status != 0:
        return f"ended with {ended.status}, and the same command with {again.status}: {end_of(again)}"
    wrong = run.subject.differences(folder, run.content)
    return f"ended with {ended.status}, and the same command has other numbers or files: {wrong[:5]}" if wrong else ""


def _untold(subject: Subject, ended: Ended) -> str:
    if ended.status < 0:
        return f"was killed by signal {-ended.status}: {end_of(ended)}"
    # Threads of other libraries may have printed what they could not write before.
    last = ended.text.strip().rpartition("\n")[2]
    if subject.tells and ended.status > 0 and not last.startswith("error: "):
        return f"ends with status {ended.status} and no sentence: {end_of(ended)}"
    return ""


def _unstopped(run: Undisturbed, number: signal.Signals, ended: Ended) -> str:
    told = f"stopped by {number.name}: "
    if not run.subject.tells:
        return "" if ended.status > 0 else f"ends with status {ended.status}: {end_of(ended)}"
    if ended.status != 128 + number or told not in ended.text or "Traceback" in ended.text:
        return f"ends with status {ended.status} and without {told!r}: {end_of(ended)}"
    return ""


def end_of(ended: Ended) -> str:
    """The end of a process's output in one line."""
    return " ".join(ended.text[-_END:].split())
