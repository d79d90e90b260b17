"""A fault counts as handled only if it came, and the run then did what the page says."""

from __future__ import annotations

import random
import signal
from contextlib import suppress

import pytest

from recipes.faults import trials
from recipes.faults.forked import Ended
from recipes.faults.injections import full_at_operation, kill_at_operation, no_fault
from recipes.faults.subjects import Subject
from recipes.faults.trials import (
    NOT_REACHED,
    Undisturbed,
    UndisturbedError,
    full_disks,
    killed,
    read_only_folders,
    signalled,
    trial,
    undisturbed,
)

KILLED, WHOLE, REFUSED = Ended(-signal.SIGKILL, ""), Ended(0, "", "0"), Ended(1, "error: no space", "1")
NAMES = [str(number) for number in range(3)]


class Files(Subject):
    """Writes those of three files that are not there."""

    name, tells, stages = "subject", True, {}

    def command(self, folder):
        folder.mkdir(exist_ok=True)
        try:
            for name in NAMES:
                if not (folder / name).exists():
                    (folder / f"{name}.tmp").write_text(name * 9)
                    (folder / f"{name}.tmp").rename(folder / name)
        except OSError as error:
            print(f"error: {error}")
            return 1
        return 0

    def content(self, folder):
        return {name: (folder / name).read_text() for name in NAMES if (folder / name).exists()}

    def leftovers(self, folder):
        return []


class Scripted(Files):
    """Its runs end as they are told to, and then as without a fault."""

    def __init__(self, *ends, content=()):
        self.ends, self.found = list(ends), dict(content)

    def run(self, folder, inject=no_fault):
        folder.mkdir(exist_ok=True)
        return self.ends.pop(0) if self.ends else WHOLE

    def content(self, folder):
        return self.found


def scripted(tmp_path, *ends, content=()):
    folder = tmp_path / "whole"
    folder.mkdir(exist_ok=True)
    for size in (0, 9):
        (folder / str(size)).write_text("x" * size)
    return Undisturbed(Scripted(*ends, content=content), folder, 40, {})


def nothing(_):
    pass


def counted(outcomes):
    return [(dict(outcome.counts), outcome.faults) for outcome in outcomes]


def killed_after(tmp_path, *ends, content=()):
    """The outcome of one kill of a run that ends so."""
    (first, _) = killed(scripted(tmp_path, *ends, content=content), 1, random.Random(0), nothing)
    return dict(first.counts), first.faults


def test_kills_and_full_disks_come(tmp_path):
    run = undisturbed(Files(), tmp_path / "whole")
    assert run.operations == 7
    (tmp_path / "whole" / "small").write_text("")
    assert counted(killed(run, 1, random.Random(0), nothing)) == [({"finished": 1}, []), ({}, [])]
    assert counted(full_disks(run, 2, random.Random(0), nothing)) == [({"finished": 1}, [])] * 2


def test_kills_that_never_come_are_counted_apart(tmp_path):
    assert counted(killed(scripted(tmp_path), 4, random.Random(0), nothing)) == [({NOT_REACHED: 2}, [])] * 2


def test_another_moment_is_drawn_if_a_run_ends_before_its_kill(tmp_path):
    assert killed_after(tmp_path, WHOLE, WHOLE, KILLED) == ({"finished": 1}, [])
    run = undisturbed(Files(), tmp_path / "run")
    draws = [kill_at_operation(run.operations), kill_at_operation(2)]
    assert trial(run, draws, lambda ended: ended.status < 0, lambda _: "") == ("finished", "")


def test_the_draws_are_bounded_and_differ(tmp_path, monkeypatch):
    places = []
    monkeypatch.setattr(trials, "kill_at_operation", lambda place: places.append(place) or no_fault)
    list(killed(scripted(tmp_path), 2, random.Random(0), nothing))
    assert 3 <= len(set(places)) <= len(places) < 10
    assert all(0 <= place < 40 for place in places)


def test_a_run_without_its_kill_has_to_end_well(tmp_path):
    counts, (fault,) = killed_after(tmp_path, Ended(1, "error: other"))
    assert counts == {}
    assert "ends with status 1 before any fault: error: other" in fault
    counts, (fault,) = killed_after(tmp_path, WHOLE, content={"a": "other"})
    assert counts == {}
    assert "ends with status 0 and other numbers or files: ['a']" in fault


def test_times_are_those_of_a_run_that_is_as_fast_as_later_ones(tmp_path, monkeypatch):
    clock, taken, times = [0.0], [100.0], []

    class Timed(Scripted):
        def run(self, folder, inject=no_fault):
            clock[0] += taken.pop() if taken else 1.0
            super().run(folder, inject)
            return Ended(0, "", "40")

    monkeypatch.setattr(trials.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(trials, "kill_after", lambda seconds: times.append(seconds) or no_fault)
    list(killed(undisturbed(Timed(), tmp_path / "whole"), 4, random.Random(0), nothing))
    assert len(times) > 2
    assert max(times) < 1


def test_runs_that_differ_without_a_fault_are_refused(tmp_path):
    with pytest.raises(UndisturbedError, match="the subject ends with status 0 and other numbers"):
        list(killed(scripted(tmp_path, content={"a": "other"}), 2, random.Random(0), nothing))


def test_disks_that_never_become_full_are_counted_apart(tmp_path):
    assert counted(full_disks(scripted(tmp_path), 4, random.Random(0), nothing)) == [({NOT_REACHED: 2}, [])] * 2


@pytest.mark.parametrize(
    ("ended", "fault"),
    [
        (REFUSED, ""),
        (Ended(1, "Exception in thread\nerror: no space\n    self.run()", "1"), ""),
        (Ended(1, "Traceback", "1"), "ends with status 1 and no sentence"),
        (Ended(0, "", "2"), "ends with status 0 after 2 writes that failed"),
        (Ended(-7, ""), "was killed by signal 7"),
    ],
)
def test_a_full_disk_ends_the_run_with_a_sentence(tmp_path, ended, fault):
    (first, _) = full_disks(scripted(tmp_path, ended), 1, random.Random(0), nothing)
    assert dict(first.counts) == ({} if fault else {"finished": 1})
    assert [fault in each for each in first.faults] == ([True] if fault else [])


def test_a_write_that_failed_is_told_of_though_the_run_ignores_it(tmp_path):
    class Ignoring(Files):
        def command(self, folder):
            with suppress(OSError):
                return super().command(folder) * 0
            return 0

    run = undisturbed(Ignoring(), tmp_path / "whole")
    (first, _) = full_disks(run, 1, random.Random(0), nothing)
    assert "ends with status 0 after 1 writes that failed" in first.faults[0]
    assert Files().run(tmp_path / "other", full_at_operation(99)).told == "0"


def read_only(tmp_path, *ends):
    (outcome,) = read_only_folders(scripted(tmp_path, *ends), 1, random.Random(0), nothing)
    return dict(outcome.counts), outcome.faults


def test_a_folder_that_cannot_be_written_to_comes(tmp_path):
    run = undisturbed(Files(), tmp_path / "whole")
    assert counted(read_only_folders(run, 1, random.Random(0), nothing)) == [({"finished": 1}, [])]


def test_folders_into_which_nothing_is_written_are_counted_apart(tmp_path):
    assert read_only(tmp_path) == ({NOT_REACHED: 1}, [])
    assert read_only(tmp_path, *[KILLED, WHOLE] * 9) == ({NOT_REACHED: 1}, [])


def test_a_refusal_may_name_what_is_in_the_folder(tmp_path):
    class Filled(Scripted):
        def run(self, folder, inject=no_fault):
            ended = super().run(folder, inject)
            (folder / "file").touch()
            return ended

    run = Undisturbed(Filled(KILLED, Ended(1, "error: Permission denied: 'file'", "1")), tmp_path / "whole", 40, {})
    assert counted(read_only_folders(run, 1, random.Random(0), nothing)) == [({"finished": 1}, [])]


def test_a_refusal_that_does_not_name_the_folder_is_a_fault(tmp_path):
    counts, (fault,) = read_only(tmp_path, KILLED, REFUSED)
    assert counts == {}
    assert "run: does not name the folder: error: no space" in fault


def test_a_signal_that_does_not_come_is_a_fault(tmp_path):
    run = scripted(tmp_path)
    run.subject.stages = {"report": ("json.dumps", 1)}
    for outcome in signalled(run, None, nothing):
        assert outcome.counts.total() == 0
        assert "in report: ends with status 0 and without 'stopped by SIG" in outcome.faults[0]
