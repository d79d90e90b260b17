"""Each fault does to a process what it is named after."""

from __future__ import annotations

import os
import pkgutil
import signal
import tempfile
import time
from pathlib import Path

import pytest

from recipes.faults.forked import forked
from recipes.faults.injections import (
    full_at_operation,
    give_away,
    kill_after,
    kill_at_operation,
    largest_file,
    no_fault,
    signal_in,
    unprivileged,
)
from recipes.faults.subjects import RecipeRun, ScriptRun


def writes(folder):
    """Four file operations."""
    for name in "ab":
        (folder / name).write_text("content")
        (folder / name).rename(folder / f"{name}{name}")
    return 0


def run(folder, inject, action=writes):
    told = []

    def injected():
        told.append(inject(folder))
        return action(folder)

    return forked(injected, lambda: told[0]())


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_status_output_and_report():
    def action():
        os.write(1, b"said")
        return 3

    ended = forked(action, lambda: 7)
    assert (ended.status, ended.text, ended.told) == (3, "said", "7")
    stopped = forked(lambda: (_ for _ in ()).throw(SystemExit(143)))
    assert stopped.status == 143
    failed = forked(lambda: 1 // 0)
    assert failed.status == 1
    assert "ZeroDivisionError" in failed.text


def test_a_child_that_hangs_is_ended():
    ended = forked(lambda: time.sleep(60), seconds=0.2)
    assert ended.status == 1
    assert "Timeout" in ended.text


def test_operations_of_other_folders_are_not_counted(tmp_path):
    (tmp_path / "run").mkdir()

    def both(folder):
        (tmp_path / "other").write_text("")
        return writes(folder)

    ended = run(tmp_path / "run", no_fault, both)
    assert (ended.status, ended.told) == (0, "4")


def test_kills(tmp_path):
    assert run(tmp_path, kill_at_operation(3)).status == -signal.SIGKILL
    assert names(tmp_path) == ["aa", "b"]
    assert run(tmp_path, kill_at_operation(9)).status == 0
    slow = run(tmp_path, kill_after(0.1), lambda _: time.sleep(30))
    assert slow.status == -signal.SIGKILL


def test_a_full_disk_refuses_what_needs_space_alone(tmp_path):
    ended = run(tmp_path, full_at_operation(1))
    assert ended.status == 1
    assert f"No space left on device: '{tmp_path / 'b'}'" in ended.text
    assert names(tmp_path) == ["aa"]
    assert ended.told == "1"
    assert run(tmp_path, full_at_operation(4)).told == "0"


def test_a_file_that_may_not_grow(tmp_path):
    ended = run(tmp_path, largest_file(3))
    assert ended.status == 1
    assert "File too large" in ended.text
    assert int(ended.told) > 0
    assert run(tmp_path, largest_file(7)).told == "0"


def test_a_signal_comes_in_a_call(tmp_path):
    def action(folder):
        for _ in range(3):
            pkgutil.resolve_name("json.dumps")({})
            (folder / f"{len(names(folder))}").write_text("")
        return 0

    assert run(tmp_path, signal_in("json.dumps", 2, signal.SIGTERM), action).status == -signal.SIGTERM
    assert names(tmp_path) == ["0"]


def test_permissions_count():
    with tempfile.TemporaryDirectory() as parent:  # not that of pytest, which no other user may enter
        folder = Path(parent) / "run"
        folder.mkdir()
        Path(parent).chmod(0o755)
        give_away(folder)
        assert run(folder, unprivileged).status == 0
        folder.chmod(0o555)
        ended = run(folder, unprivileged)
        assert ended.status == 1
        assert "PermissionError" in ended.text


@pytest.mark.parametrize("subject", [RecipeRun, ScriptRun])
def test_where_signals_come_is_still_there(subject):
    for target, call in subject.stages.values():
        assert callable(pkgutil.resolve_name(target))
        assert call > 0
