"""Which folder a run writes to, and which folders may have a fit."""

from __future__ import annotations

import multiprocessing
import os
import types
import uuid
from pathlib import Path

import pytest
from fake_trainer import FakeTrainer
from unprivileged import unprivileged_folder

from bmoe_lightning.methods import FitResult
from bmoe_lightning.methods.storage import save_fit
from bmoe_lightning.trainer.folders import (
    belongs_to,
    beside_checkpoint,
    claim,
    claimed_version,
    default_folder,
    folders_of_other_runs,
    is_version,
    killed_versions,
    training_id,
    unmark_training,
    versions_with_fit,
)
from bmoe_lightning.utils.folder_lock import FolderInUseError, FolderLock

ONE, TWO = "1" * 32, "2" * 32


def fit_in(folder, fit_id=ONE):
    save_fit(folder, FitResult(fit_id=fit_id))
    return folder


def logger(root, version):
    return types.SimpleNamespace(save_dir=str(root), name="name", version=version)


class TestDefaultFolder:
    def test_is_beside_the_checkpoints_of_lightning(self, tmp_path):
        assert default_folder(FakeTrainer(default_root_dir=str(tmp_path))) == tmp_path / "bayesian_moe"
        for version, name in ((3, "version_3"), ("abc", "abc")):
            run = FakeTrainer(loggers=[logger(tmp_path, version)])
            assert default_folder(run, "sub") == tmp_path / "name" / name / "bayesian_moe" / "sub"

    def test_versions_are_those_of_one_folder(self, tmp_path):
        first = tmp_path / "bayesian_moe"
        assert is_version(first, first)
        assert is_version(tmp_path / "bayesian_moe-v12", first)
        assert is_version(first, tmp_path / "bayesian_moe-v12")
        assert not is_version(tmp_path / "bayesian_moe-vx", first)
        assert not is_version(tmp_path / "sub" / "bayesian_moe", first)
        assert not is_version(Path("/"), first)


class TestFoldersWithFits:
    def test_the_latest_version_is_first(self, tmp_path):
        first = fit_in(tmp_path / "fit")
        (tmp_path / "fit-v1").mkdir()  # of a killed run
        third = fit_in(tmp_path / "fit-v2")
        fit_in(tmp_path / "fit-v4")  # is no version: there is no third one
        assert versions_with_fit(first) == versions_with_fit(third) == [third, first]

    def test_those_of_other_runs_of_the_logger(self, tmp_path):
        for position, version in enumerate((0, 10, 2)):
            folder = fit_in(tmp_path / "name" / f"version_{version}" / "bayesian_moe")
            os.utime(folder / "index.json", (position, position))
        fit_in(tmp_path / "name" / "other" / "bayesian_moe")
        (tmp_path / "name" / "version_7").write_text("")
        found = folders_of_other_runs(FakeTrainer(loggers=[logger(tmp_path, 10)]))
        assert [path.parent.name for path in found] == ["version_2", "version_0"]
        assert folders_of_other_runs(FakeTrainer(default_root_dir=str(tmp_path / "name"))) == []
        assert folders_of_other_runs(FakeTrainer(loggers=[logger(tmp_path / "new", 0)])) == []

    def test_those_of_other_runs_with_ids_for_names(self, tmp_path):
        for position, version in enumerate(("k3j2", "version_1", "9abc")):
            folder = fit_in(tmp_path / "name" / version / "bayesian_moe")
            os.utime(folder / "index.json", (position, position))
        (tmp_path / "name" / "meta.yaml").write_text("")
        found = folders_of_other_runs(FakeTrainer(loggers=[logger(tmp_path, "k3j2")]))
        assert [path.parent.name for path in found] == ["9abc", "version_1"]

    def test_those_beside_a_checkpoint(self, tmp_path):
        saved = tmp_path / "run" / "checkpoints" / "last.ckpt"
        folder, second, mine = (tmp_path / "run" / name for name in ("bayesian_moe", "bayesian_moe-v1", "mine"))
        for path in (folder, second, mine):
            path.mkdir(parents=True)
        assert beside_checkpoint(saved, None) == [folder, second, saved.parent]
        assert beside_checkpoint(saved, Path("/elsewhere/mine")) == [mine, folder, second, saved.parent]

    @pytest.mark.parametrize("earlier", ["/", "..", "x/..", "/x/..", ".", "", "x" * 5000, "a\0b", "//"])
    def test_a_crafted_path_leads_nowhere_else(self, tmp_path, earlier):
        saved = tmp_path / "a" / "b" / "checkpoints" / "last.ckpt"
        saved.parent.mkdir(parents=True)
        for path in beside_checkpoint(saved, Path(earlier), "name"):
            assert path.resolve().is_relative_to(tmp_path / "a" / "b")
        assert not belongs_to(Path(earlier), ONE)


def claiming(root, found, at_once, done):
    lock = FolderLock()
    for name in ("new", "resumed"):
        at_once.wait()
        found.put(claimed_version(root / name, uuid.uuid4().hex if name == "new" else ONE, lock).name)
        at_once.wait()
    done.wait()


class TestClaims:
    def test_runs_have_versions_of_their_own(self, tmp_path):
        first, locks = tmp_path / "fit", [FolderLock() for _ in range(3)]
        assert claimed_version(first, ONE, locks[0]) == first
        assert claimed_version(first, TWO, locks[1]) == tmp_path / "fit-v1"
        assert [training_id(path) for path in (first, tmp_path / "fit-v1")] == [ONE, TWO]
        # Whichever version it starts from, a run has its own.
        assert claimed_version(tmp_path / "fit-v1", ONE, locks[0]) == first
        unmark_training(first, TWO)
        assert training_id(first) == ONE
        unmark_training(first, ONE)
        assert training_id(first) is None
        assert claimed_version(first, "3" * 32, locks[2]) == first

    def test_a_fit_is_never_replaced_by_another_run(self, tmp_path):
        first = fit_in(tmp_path / "fit")
        assert claimed_version(first, TWO, FolderLock()) == tmp_path / "fit-v1"
        assert claimed_version(first, ONE, FolderLock()) == first

    def test_a_fit_that_is_written_in_between(self, tmp_path, monkeypatch):
        """Another process writes its fit, and removes its mark, after this one has looked for a fit."""
        from bmoe_lightning.trainer import folders

        looks = iter([None, ONE])
        monkeypatch.setattr(folders, "stored_fit_id", lambda path: next(looks) if path.name == "fit" else None)
        assert claimed_version(tmp_path / "fit", TWO, FolderLock()) == tmp_path / "fit-v1"
        assert training_id(tmp_path / "fit") is None

    def test_a_damaged_mark_is_a_mark(self, tmp_path):
        (tmp_path / "fit").mkdir()
        (tmp_path / "fit" / ".training").write_bytes(b"\xff")
        assert training_id(tmp_path / "fit") == ""
        assert claimed_version(tmp_path / "fit", ONE, FolderLock()) == tmp_path / "fit-v1"

    def test_processes_that_start_at_once(self, tmp_path):
        """Each gets a version of its own; so do those that resume the same run."""
        claim(tmp_path / "resumed", ONE, FolderLock())  # of a killed run, whose lock is gone
        context = multiprocessing.get_context("fork")
        found, at_once, done = context.Queue(), context.Barrier(4), context.Event()
        children = [context.Process(target=claiming, args=(tmp_path, found, at_once, done)) for _ in range(4)]
        for child in children:
            child.start()
        try:
            names = sorted(found.get(timeout=60) for _ in range(8))
        finally:
            done.set()
            for child in children:
                child.join(timeout=60)
        assert names == [f"{name}{version}" for name in ("new", "resumed") for version in ("", "-v1", "-v2", "-v3")]

    def test_the_run_that_was_killed(self, tmp_path):
        first = tmp_path / "fit"
        assert list(killed_versions(first, FolderLock())) == []
        fit_in(claimed_version(first, ONE, FolderLock()))
        unmark_training(first, ONE)
        assert list(killed_versions(first, FolderLock())) == []
        second = claimed_version(first, TWO, FolderLock())
        assert [*killed_versions(first, FolderLock())] == [second] == [tmp_path / "fit-v1"]

    def test_a_folder_of_the_user_is_refused_while_another_process_trains_into_it(self, tmp_path, monkeypatch):
        def locked(_, folder):
            raise FolderInUseError(f"another process is running in {folder}; wait for its end")

        claim(tmp_path / "fit", ONE, FolderLock())
        claim(tmp_path / "fit", TWO, FolderLock())
        monkeypatch.setattr(FolderLock, "acquire", locked)
        with pytest.raises(FolderInUseError, match="wait for its end, or pass another dirpath="):
            claim(tmp_path / "fit", ONE, FolderLock())
        assert training_id(tmp_path / "fit") == TWO
        assert list(killed_versions(tmp_path / "fit", FolderLock())) == []


class TestPlacesThatCannotBeUsed:
    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("file", "Not a directory"),
            ("file/below", "Not a directory"),
            ("dangling", "No such file or directory"),
            ("dangling/below", "No such file or directory"),
            ("loop", "Too many levels of symbolic links"),
            ("x" * 300, "File name too long"),
            ("a\0b", "embedded null"),
        ],
    )
    def test_is_one_sentence_before_training(self, tmp_path, name, reason):
        (tmp_path / "file").write_text("")
        (tmp_path / "dangling").symlink_to(tmp_path / "gone")
        (tmp_path / "loop").symlink_to("loop")
        with pytest.raises(OSError, match=rf"cannot be written to .*\(.*{reason}.*\); pass another dirpath="):
            claim(tmp_path / name, ONE, FolderLock())
        assert not (tmp_path / "gone").exists()

    @pytest.mark.parametrize("mode", [0o000, 0o500, 0o300, 0o400])
    def test_without_permission(self, mode):
        with unprivileged_folder() as root:
            folder = root / "fit"
            folder.mkdir()
            folder.chmod(mode)
            with pytest.raises(OSError, match=r"fit is not a writable folder \(Permission denied\); pass another"):
                claim(folder, ONE, FolderLock())
            if mode in (0o000, 0o400):
                with pytest.raises(OSError, match=r"fit is not a writable folder \(Permission denied\)"):
                    claim(folder / "below", ONE, FolderLock())

    def test_a_version_of_somebody_else_is_left_alone(self):
        with unprivileged_folder() as root:
            (root / "fit").mkdir(mode=0o000)
            assert not belongs_to(root / "fit", ONE)
            assert versions_with_fit(root / "fit") == [root / "fit"]  # it may have one, which is said
            assert claimed_version(root / "fit", ONE, FolderLock()) == root / "fit-v1"
