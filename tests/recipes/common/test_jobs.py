"""Jobs in processes: order, failures, and nothing left running."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import torch

from recipes.common import jobs
from recipes.common.errors import RecipeError
from recipes.common.jobs import Job, jobs_at_a_time, run_jobs


def job(folder, name, code):
    return Job(name, ("-c", code), folder / f"{name}.log")


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_all_are_run_and_their_output_stored(tmp_path, capsys):
    run_jobs([job(tmp_path, name, f"print('{name} was here')") for name in "abc"], 2)
    assert [(tmp_path / f"{name}.log").read_text() for name in "abc"] == [f"{name} was here\n" for name in "abc"]
    shown = capsys.readouterr().out
    assert "[3 of 3] c" in shown
    assert "a: 0 s" in shown


def test_no_more_than_asked_for_run_at_a_time(tmp_path):
    code = "import time, pathlib; pathlib.Path(r'{}').touch(); time.sleep(0.6)"
    both = [job(tmp_path, name, code.format(tmp_path / f"{name}.started")) for name in "ab"]
    started = time.monotonic()
    run_jobs(both, 1)
    assert time.monotonic() - started > 1.2
    times = [(tmp_path / f"{name}.started").stat().st_mtime for name in "ab"]
    assert times[1] - times[0] > 0.5


def test_a_job_begins_after_the_one_that_it_waits_for(tmp_path, capsys):
    first = job(tmp_path, "first", "import time; time.sleep(0.6)")
    then = Job("then", ("-c", ""), tmp_path / "then.log", after="first")
    run_jobs([first, then, job(tmp_path, "other", "")], 2)
    lines = [line.split("] ")[-1] for line in capsys.readouterr().out.splitlines()]
    ended = next(number for number, line in enumerate(lines) if line.startswith("first: "))
    assert lines.index("other") < ended < lines.index("then")


@pytest.mark.parametrize(
    ("given", "accelerator", "small", "expected"),
    [
        (None, "cpu", True, 7),
        (None, "auto", True, 7),
        (None, "cpu", False, 1),
        (None, "gpu", True, 1),
        (3, "gpu", False, 3),
    ],
)
def test_small_models_on_the_cpu_run_several_at_a_time(monkeypatch, given, accelerator, small, expected):
    monkeypatch.setattr(jobs, "default_jobs", lambda: 7)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert jobs_at_a_time(given, accelerator, small=small) == expected
    monkeypatch.setattr("bmoe_lightning.utils.distributed.num_processes", lambda: 2)
    assert jobs_at_a_time(given, accelerator, small=small) == 1


def waiting_for(path, then):
    """Code that waits for a file, for a minute at most."""
    return (
        f"import os, pathlib, sys, time\nfor _ in range(6000): os.path.exists({str(path)!r}) or time.sleep(.01)\n{then}"
    )


def test_a_failure_is_named_and_the_running_ones_are_waited_for(tmp_path, monkeypatch):
    """A training that is stopped is lost, so it goes on after another run has failed; none begins."""
    begun, told, done = (tmp_path / name for name in ("begun", "told", "done"))
    shown = []

    def recorded(line, **_):
        shown.append(line)
        if "fails failed" in line:
            told.touch()

    monkeypatch.setattr(jobs, "print", recorded, raising=False)
    begins = f"import pathlib; pathlib.Path({str(begun)!r}).touch()\n"
    slow = job(tmp_path, "slow", begins + waiting_for(told, f"pathlib.Path({str(done)!r}).touch()"))
    fails = job(tmp_path, "fails", waiting_for(begun, "sys.exit('gone')"))
    with pytest.raises(RecipeError, match=r"^fails failed with exit status 1: gone \(all of it is in .*fails\.log\)$"):
        run_jobs([slow, fails, job(tmp_path, "never", "")], 2)
    assert done.exists()
    assert not (tmp_path / "never.log").exists()
    assert "fails failed; waiting for slow" in shown
    assert any(line.startswith("slow: ") for line in shown)


def test_all_that_failed_are_named(tmp_path):
    failing = [job(tmp_path, "a", "import sys; sys.exit('gone')"), job(tmp_path, "b", "import sys; sys.exit(3)")]
    with pytest.raises(RecipeError) as caught:
        run_jobs(failing, 2)
    assert "a failed with exit status 1: gone" in str(caught.value)
    assert "b failed with exit status 3: no output" in str(caught.value)


def test_they_are_stopped_when_this_process_is(tmp_path):
    path = tmp_path / "pid"
    waits = f"import os, pathlib, time; pathlib.Path({str(path)!r}).write_text(str(os.getpid())); time.sleep(60)"
    code = f"""
from pathlib import Path
from recipes.common.signals import sigterm_exits
from recipes.common import jobs
from recipes.common.jobs import Job, run_jobs
with sigterm_exits():
    run_jobs([Job("waits", ("-c", {waits!r}), Path({str(tmp_path / "waits.log")!r}))], 1)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment)
    deadline = time.monotonic() + 60
    while not (path.exists() and path.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.terminate()
    process.wait(60)
    assert not alive(int(path.read_text()))
