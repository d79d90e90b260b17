"""Jobs in processes: order, failures, and nothing left running."""

from __future__ import annotations

import os
import time

import pytest

from recipes.paper.jobs import Job, JobError, run_jobs


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
    jobs = [job(tmp_path, name, code.format(tmp_path / f"{name}.started")) for name in "ab"]
    started = time.monotonic()
    run_jobs(jobs, 1)
    assert time.monotonic() - started > 1.2
    times = [(tmp_path / f"{name}.started").stat().st_mtime for name in "ab"]
    assert times[1] - times[0] > 0.5


def test_a_failure_is_named_and_stops_the_others(tmp_path):
    waits = "import os, pathlib, time; pathlib.Path(r'{}').write_text(str(os.getpid())); time.sleep(60)"
    slow = job(tmp_path, "slow", waits.format(tmp_path / "pid"))
    path = str(tmp_path / "pid")
    fails = job(
        tmp_path,
        "fails",
        f"import os, sys, time\nwhile not os.path.exists({path!r}): time.sleep(.01)\nsys.exit('gone')",
    )
    with pytest.raises(JobError, match=r"fails failed with exit status 1: gone \(all of it is in .*fails\.log\)"):
        run_jobs([slow, fails, job(tmp_path, "never", "")], 2)
    assert not alive(int((tmp_path / "pid").read_text() or 0))
    assert not (tmp_path / "never.log").exists()
