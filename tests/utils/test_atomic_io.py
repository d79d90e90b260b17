"""Atomic writes."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from bmoe_lightning.utils import atomic_io
from bmoe_lightning.utils.atomic_io import (
    remove_all_leftovers,
    remove_leftovers,
    replaced_file,
    write_bytes,
    write_text,
)


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_bytes(path, b"old")
    assert stat.S_IMODE(path.stat().st_mode) & 0o400

    def broken(self, target):
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_an_error_while_writing_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "é")

    def stop_half_way():
        with replaced_file(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        stop_half_way()
    assert path.read_bytes() == "é".encode()
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


NAMES = ("a[1].bin", ".a1.bin.ff.tmp", ".a[1].bin.json", ".b.bin.ff.tmp", ".a[1].bin.mine.tmp", ".a[1].bin.tmp")


def killed_writer(path):
    """The name of a temporary file that a killed writer left, beside files of others."""
    with replaced_file(path) as temporary:
        left = temporary.name
    for name in (left, *NAMES):
        (path.parent / name).write_text("")


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    killed_writer(tmp_path / "a[1].bin")
    remove_leftovers(tmp_path / "a[1].bin")
    assert {p.name for p in tmp_path.iterdir()} == set(NAMES)
    remove_leftovers(tmp_path / "missing" / "a.bin")


def test_the_next_write_removes_leftovers(tmp_path):
    killed_writer(tmp_path / "a[1].bin")
    write_text(tmp_path / "a[1].bin", "new")
    assert {p.name for p in tmp_path.iterdir()} == set(NAMES)
    assert (tmp_path / "a[1].bin").read_text() == "new"


def temporary_of(path, host, pid):
    file = path.with_name(f".{path.name}.{host}-{pid}-{'0' * 32}.tmp")
    file.touch()
    return file


@pytest.fixture
def ended():
    """The id of a process that has ended."""
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    return int(done.stdout)


def test_the_file_of_a_running_process_stays(tmp_path, ended):
    path = tmp_path / "a.bin"
    with replaced_file(path) as temporary:
        host, pid, _ = temporary.name.removeprefix(".a.bin.").split("-")
        assert (host, pid) == (atomic_io._HOST, str(os.getpid()))
    running = temporary_of(path, atomic_io._HOST, os.getppid())
    left = [temporary_of(path, atomic_io._HOST, pid) for pid in (ended, os.getpid(), 10**30)]
    remove_leftovers(path)
    assert running.exists()
    assert not any(file.exists() for file in left)


def test_the_file_of_another_machine_stays_for_an_hour(tmp_path, ended):
    path = tmp_path / "a.bin"
    fresh, old = temporary_of(path, "elsewhere", ended), temporary_of(path, "elsewhere", ended + 1)
    os.utime(old, (0, 0))
    remove_leftovers(path)
    assert fresh.exists()
    assert not old.exists()


def test_all_leftovers_of_a_folder(tmp_path, ended):
    (tmp_path / "notes.tmp").touch()
    (tmp_path / ".a.bin.mine.tmp").touch()
    for name in ("a.bin", "b.json"):
        temporary_of(tmp_path / name, "elsewhere", ended)
    (tmp_path / f".c.{'0' * 32}.tmp").touch()
    remove_all_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".a.bin.mine.tmp", "notes.tmp"]
    remove_all_leftovers(tmp_path / "missing")
