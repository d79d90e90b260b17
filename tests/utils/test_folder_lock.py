"""Locks on folders exclude other processes, and end with the process that has them."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from bmoe_lightning.utils.folder_lock import FolderInUseError, FolderLock, locked_folder

SCRIPT = (
    "import sys; from pathlib import Path; from bmoe_lightning.utils.folder_lock import FolderLock\n"
    "print(FolderLock().acquire(Path(sys.argv[1])), flush=True); sys.stdin.read()"
)


@contextmanager
def locked_by_another_process(folder):
    command = [sys.executable, "-c", SCRIPT.replace("FolderLock()", "(lock := FolderLock())"), str(folder)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    ) as other:
        assert other.stdout.readline() == "True\n"
        try:
            yield other
        finally:
            other.kill()


def test_another_process_is_refused_until_it_is_killed(tmp_path):
    lock = FolderLock()
    with locked_by_another_process(tmp_path) as other:
        with pytest.raises(FolderInUseError, match=rf"another process is running in {tmp_path}; wait for its end"):
            lock.acquire(tmp_path)
        with pytest.raises(FolderInUseError), locked_folder(tmp_path):
            pass
        other.kill()
        other.wait()
        assert lock.acquire(tmp_path)
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_one_process_may_lock_a_folder_twice(tmp_path):
    outer, inner = FolderLock(), FolderLock()
    assert outer.acquire(tmp_path)
    assert inner.acquire(tmp_path)
    outer.release()
    # Still locked, by the other one.
    assert others_can_lock(tmp_path) is False
    inner.release()
    assert others_can_lock(tmp_path) is True


def others_can_lock(folder):
    try:
        with locked_by_another_process(folder):
            return True
    except AssertionError:
        return False


def test_another_folder_replaces_the_first(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    lock = FolderLock()
    lock.acquire(tmp_path / "a")
    lock.acquire(tmp_path / "b")
    assert others_can_lock(tmp_path / "a") is True
    assert others_can_lock(tmp_path / "b") is False
    lock.release()
    lock.release()  # nothing is left to do


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda lock: pickle.loads(pickle.dumps(lock))])
def test_a_copy_is_not_locked(tmp_path, copied):
    lock = FolderLock()
    lock.acquire(tmp_path)
    other = copied(lock)
    other.release()
    assert others_can_lock(tmp_path) is False
    lock.release()


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="there is no list of descriptors")
def test_no_descriptor_is_left(tmp_path):
    def count():
        return len(list(Path("/proc/self/fd").iterdir()))

    before = count()
    for _ in range(3):
        with locked_folder(tmp_path) as locked:
            assert locked
    assert count() == before
