"""The files of snapshots: names, attempts that were given up, and what a resumed run takes over."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from bmoe_lightning.methods.snapshots import save_snapshot, snapshot_info
from bmoe_lightning.trainer import snapshot_files
from bmoe_lightning.trainer.snapshot_files import (
    copied,
    epoch_of,
    has_snapshots,
    latest_snapshots,
    new_snapshot,
    taken_over,
)

FIT, OTHER = "ab" * 16, "cd" * 16


def written(folder, epoch, *, fit=FIT, value=0.0, age=0):
    """A snapshot of an epoch, written some seconds ago."""
    path = new_snapshot(folder, fit, epoch)
    save_snapshot(path, {"weight": torch.full((2,), value)}, fit=fit)
    at = path.stat().st_mtime - age
    os.utime(path, (at, at))
    return path


def names(paths):
    return [path.name for path in paths]


def test_an_epoch_that_is_trained_again_gets_a_name_that_none_had(tmp_path):
    found = [written(tmp_path, 7) for _ in range(3)]
    found[0].unlink()
    found.append(written(tmp_path, 7))
    assert all(name.startswith("abababab-epoch-0007-") for name in names(found))
    assert len(set(names(found))) == 4
    assert {path.parent for path in found} == {tmp_path / "snapshots"}
    assert written(tmp_path, 12345, fit=OTHER).name.startswith("cdcdcdcd-epoch-12345-")


@pytest.mark.parametrize(
    ("name", "epoch"),
    [
        ("abababab-epoch-0007.safetensors", 7),
        ("abababab-epoch-0007-0123cdef.safetensors", 7),
        ("abababab-epoch-0007-v12.safetensors", 7),
        ("abababab-epoch-0007-0123.safetensors", -1),
        ("abababab-epoch-12345.safetensors", 12345),
        ("abababab-epoch-007.safetensors", -1),
        ("abababab-epoch-0007.safetensors.tmp", -1),
        (".abababab-epoch-0007.safetensors", -1),
        ("xbababab-epoch-0007.safetensors", -1),
        ("last.safetensors", -1),
    ],
)
def test_the_epoch_of_a_name(name, epoch):
    assert epoch_of(Path("folder") / name) == epoch


def test_whether_there_are_any(tmp_path):
    assert not has_snapshots(tmp_path, FIT)
    written(tmp_path, 1)
    assert has_snapshots(tmp_path, FIT)
    assert not has_snapshots(tmp_path, OTHER)
    assert not has_snapshots(tmp_path, "")


class TestLatest:
    def test_of_a_folder_without_any(self, tmp_path):
        assert latest_snapshots(tmp_path) == []
        (tmp_path / "snapshots").mkdir()
        (tmp_path / "snapshots" / "last.safetensors").write_bytes(b"")
        assert latest_snapshots(tmp_path) == []

    def test_one_for_each_epoch_in_their_order(self, tmp_path):
        """Epoch 1 was trained again, from a checkpoint after epoch 0; epoch 2 of the first attempt is given up."""
        kept = written(tmp_path, 0, age=50)
        written(tmp_path, 1, age=40)
        written(tmp_path, 2, age=30)
        again = written(tmp_path, 1, age=20)
        assert latest_snapshots(tmp_path) == [kept, again]
        last = written(tmp_path, 2, age=10)
        assert latest_snapshots(tmp_path) == [kept, again, last]

    def test_of_the_run_that_wrote_last_or_of_the_one_asked_for(self, tmp_path):
        mine = written(tmp_path, 5, age=20)
        other = written(tmp_path, 3, fit=OTHER, age=10)
        assert latest_snapshots(tmp_path) == [other]
        assert latest_snapshots(tmp_path, FIT) == [mine]
        assert latest_snapshots(tmp_path, "ef" * 16) == []


class TestTakenOver:
    def test_into_another_folder(self, tmp_path):
        before = [written(tmp_path / "old", epoch, value=epoch) for epoch in (1, 2)]
        found, missing = taken_over(tmp_path / "old", names(before), FIT, tmp_path / "new", FIT)
        assert missing == []
        assert [path.parent for path in found] == [tmp_path / "new" / "snapshots"] * 2
        assert [path.read_bytes() for path in found] == [path.read_bytes() for path in before]
        again, _ = taken_over(tmp_path / "old", names(before), FIT, tmp_path / "new", FIT)
        assert again == found
        assert sorted((tmp_path / "new" / "snapshots").iterdir()) == found

    def test_in_the_same_folder_nothing_is_copied(self, tmp_path):
        before = [written(tmp_path, epoch) for epoch in (1, 2)]
        assert taken_over(tmp_path, names(before), FIT, tmp_path, FIT) == (before, [])
        assert len(list((tmp_path / "snapshots").iterdir())) == 2

    def test_what_is_missing_of_another_fit_or_elsewhere(self, tmp_path):
        mine, other = written(tmp_path / "old", 1), written(tmp_path / "old", 1, fit=OTHER)
        outside = tmp_path / "abababab-epoch-0002.safetensors"
        save_snapshot(outside, {"weight": torch.ones(2)}, fit=FIT)
        lost = ["abababab-epoch-0009.safetensors", other.name, f"../../{outside.name}", str(outside), ""]
        found, missing = taken_over(tmp_path / "old", [lost[0], mine.name, *lost[1:]], FIT, tmp_path / "new", FIT)
        assert names(found) == [mine.name]
        assert missing == lost


class TestCopied:
    def test_other_content_of_the_same_name_stays(self, tmp_path):
        mine = written(tmp_path / "old", 1, value=1.0)
        there = written(tmp_path / "new", 1, value=2.0)
        there = there.rename(there.with_name(mine.name))
        before = there.read_bytes()
        copy = copied(mine, tmp_path / "new")
        assert copy.name != mine.name
        assert snapshot_info(copy).digest == snapshot_info(mine).digest
        assert there.read_bytes() == before

    def test_a_copy_that_fails_leaves_nothing(self, tmp_path, monkeypatch):
        mine = written(tmp_path / "old", 1)

        def cut_off(source, target):
            Path(target).write_bytes(b"half")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(snapshot_files.shutil, "copyfile", cut_off)
        with pytest.raises(OSError, match="No space left"):
            copied(mine, tmp_path / "new")
        assert list((tmp_path / "new" / "snapshots").iterdir()) == []
