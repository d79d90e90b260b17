"""Trials: inject a fault into a run, run the same command again, and compare with a run without faults."""

from __future__ import annotations

import random
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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

NOT_REACHED = "not reached"
"""Outcome of a fault that came in no run."""

_DRAWS = 5  # of a place, time or size, until the fault comes before the run ends
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
        content: Digests of what it computed.
    """

    subject: Subject
    folder: Path
    operations: int
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
    ended = subject.run(folder)
    if ended.status != 0:
        raise UndisturbedError(f"the {subject.name} fails without a fault (status {ended.status}): {end_of(ended)}")
    return Undisturbed(subject, folder, int(ended.told), subject.content(folder))


def killed(run: Undisturbed, count: int, rng: random.Random, advance: Step) -> Iterator[Outcome]:
    """Kill runs: half before file operations that are evenly spaced, half at random times.

    Args:
        run: The run without faults.
        count: Number of kills.
        rng: Source of the times.
        advance: Called after each.
    """
    at_operations, at_times = count - count // 2, count // 2
    seconds = _seconds(run) if at_times else 0.0
    kinds = {
        "killed before a file operation": _at_operations(run, at_operations, rng, kill_at_operation),
        "killed at a random time": _drawn(at_times, lambda: kill_after(rng.uniform(0, seconds))),
    }
    return _tried(run, kinds, _is_killed, lambda _: "", advance)


def full_disks(run: Undisturbed, count: int, rng: random.Random, advance: Step) -> Iterator[Outcome]:
    """Have the disk become full at file operations, and bound the size of files; arguments are those of `killed`."""
    at_operations, by_size = count - count // 2, count // 2
    sizes = sorted({path.stat().st_size for path in run.folder.rglob("*") if path.is_file()})
    kinds = {
        "on a disk that becomes full": _at_operations(run, at_operations, rng, full_at_operation),
        "whose files may not grow": _drawn(by_size, lambda: largest_file(rng.choice(sizes[:-1]) + 1)),
    }
    return _tried(run, kinds, _is_refused, partial(_unnoticed, run.subject), advance)


def _seconds(run: Undisturbed) -> float:
    """How long the command takes after the first time, when the system has its files in memory."""
    folder = run.folder.with_name("trial")
    run.subject.remove(folder)
    started = time.monotonic()
    ended = run.subject.run(folder)
    seconds = time.monotonic() - started
    if ended.status != 0 or (fault := _before_its_fault(run, folder, ended)):
        raise UndisturbedError(f"the {run.subject.name} {fault}")
    return seconds


def _drawn(count: int, draw: Callable[[], Inject]) -> list[list[Inject]]:
    """For each fault, one to inject, and others for runs that end before it."""
    return [[draw() for _ in range(_DRAWS)] for _ in range(count)]


def _at_operations(
    run: Undisturbed, count: int, rng: random.Random, inject: Callable[[int], Inject]
) -> list[list[Inject]]:
    """The same at file operations, of which the first of each fault are evenly spaced."""
    found = _drawn(count, lambda: inject(rng.randrange(run.operations)))
    for number, draws in enumerate(found):
        draws[0] = inject(int((number + rng.random()) * run.operations / count))
    return found


def _tried(
    run: Undisturbed,
    kinds: Mapping[str, Sequence[Sequence[Inject]]],
    came: Callable[[Ended], bool],
    complaint: Callable[[Ended], str],
    advance: Step,
) -> Iterator[Outcome]:
    for kind, faults in kinds.items():
        outcome = Outcome(f"{run.subject.name} {kind}")
        for number, draws in enumerate(faults):
            outcome.add(*trial(run, draws, came, complaint))
            advance(f"{number + 1} of {len(faults)} {kind}")
        yield outcome


def read_only_folders(run: Undisturbed, count: int, rng: random.Random, advance: Step) -> Iterator[Outcome]:
    """Take the permission to write from folders of runs that were killed; arguments are those of `killed`."""
    outcome = Outcome(f"{run.subject.name} with a folder that cannot be written to")
    for number in range(count):
        found = NOT_REACHED, ""
        for _ in range(_DRAWS):
            # Not in the output folder, which another user may not be allowed to enter.
            with tempfile.TemporaryDirectory() as parent:
                found = _with_locked_folder(run, Path(parent).resolve(), rng)
            if found != (NOT_REACHED, ""):
                break
        outcome.add(*found)
        advance(f"{number + 1} of {count} folders")
    yield outcome


def _with_locked_folder(run: Undisturbed, parent: Path, rng: random.Random) -> tuple[str, str]:
    """The outcome, and what was not handled; a folder into which the rest of the run writes nothing is not reached."""
    folder = parent / "run"
    folder.mkdir()
    parent.chmod(0o755)
    ended = run.subject.run(folder, kill_at_operation(rng.randrange(run.operations // 4, run.operations)))
    if not _is_killed(ended):
        return NOT_REACHED, _before_its_fault(run, folder, ended)
    give_away(parent)
    locked = rng.choice(sorted(path for path in (folder, *folder.rglob("*")) if path.is_dir()))
    locked.chmod(0o555)
    ended = run.subject.run(folder, unprivileged)
    locked.chmod(0o755)
    if ended.status == 0:
        outcome, fault = NOT_REACHED, _before_its_fault(run, folder, ended)
    else:
        outcome, fault = "finished", _unnamed(run.subject, locked, ended) or _repeated(run, folder, ended)
    return outcome, f"{locked.relative_to(parent)}: {fault}" if fault else ""


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
        # Where the signal does not come, the status is that of a run without it, and that is complained of.
        outcome, fault = trial(run, [inject], lambda _: True, partial(_unstopped, run, number))
        outcomes[number].add(outcome, f"in {stage}: {fault}" if fault else "")
        advance(f"{number.name} in {stage}")
    yield from (outcome for outcome in outcomes.values() if outcome.tried)


def trial(
    run: Undisturbed, draws: Sequence[Inject], came: Callable[[Ended], bool], complaint: Callable[[Ended], str]
) -> tuple[str, str]:
    """Run a command with a fault, then without one, and compare.

    Args:
        run: The run without faults.
        draws: The fault, and others that are tried in turn if the run ends before it.
        came: Whether the end of a run shows that its fault came.
        complaint: What is wrong with the end of the run that had the fault; empty if nothing is.

    Returns:
        The outcome, and what was not handled; empty if all was.
    """
    folder = run.folder.with_name("trial")
    outcome, fault = NOT_REACHED, ""
    for inject in draws:
        run.subject.remove(folder)
        ended = run.subject.run(folder, inject)
        if came(ended):
            outcome, fault = "finished", complaint(ended) or _repeated(run, folder, ended)
        else:
            fault = _before_its_fault(run, folder, ended)
        if fault or outcome != NOT_REACHED:
            break
    run.subject.remove(folder)
    return outcome, fault


def _is_killed(ended: Ended) -> bool:
    return ended.status == -signal.SIGKILL


def _is_refused(ended: Ended) -> bool:
    """Whether a write has failed; a process that was killed has not told."""
    return ended.told != "0"


def _before_its_fault(run: Undisturbed, folder: Path, ended: Ended) -> str:
    """What is wrong with a run that had no fault."""
    if ended.status != 0:
        return f"ends with status {ended.status} before any fault: {end_of(ended)}"
    wrong = run.subject.differences(folder, run.content)
    return f"ends with status 0 and other numbers or files: {wrong[:5]}" if wrong else ""


def _repeated(run: Undisturbed, folder: Path, ended: Ended) -> str:
    """What the same command does not put right."""
    again = run.subject.run(folder)
    if again.status != 0:
        return f"ended with {ended.status}, and the same command with {again.status}: {end_of(again)}"
    wrong = run.subject.differences(folder, run.content)
    return f"ended with {ended.status}, and the same command has other numbers or files: {wrong[:5]}" if wrong else ""


def _unnoticed(subject: Subject, ended: Ended) -> str:
    """What is wrong with the end of a run that could not write what it had to."""
    if ended.status == 0:
        return f"ends with status 0 after {ended.told} writes that failed: {end_of(ended)}"
    if ended.status < 0:
        return f"was killed by signal {-ended.status}: {end_of(ended)}"
    # Threads of other libraries may print what they could not write before it, after it or on both sides.
    if subject.tells and not any(line.startswith("error: ") for line in ended.text.splitlines()):
        return f"ends with status {ended.status} and no sentence: {end_of(ended)}"
    return ""


def _unnamed(subject: Subject, locked: Path, ended: Ended) -> str:
    """What is wrong with the end of a run that could not write into a folder; another permission may be the reason."""
    # What removes a whole folder names the entry alone.
    names = [str(locked), *(repr(path.name) for path in locked.iterdir())]
    named = any(name in ended.text for name in names)
    return _unnoticed(subject, ended) or ("" if named else f"does not name the folder: {end_of(ended)}")


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
