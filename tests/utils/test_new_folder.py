"""Folders that are there in full or not at all."""

from __future__ import annotations

import subprocess
import sys
import uuid

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from bmoe_lightning.utils.new_folder import UNFINISHED, FolderFilledError, new_folder, remove_unfinished


def test_the_folder_appears_when_it_is_complete(tmp_path):
    target = tmp_path / "deep" / "folder"
    with new_folder(target) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text("content")
        assert not target.exists()
        assert folder.parent == target.parent
    assert (target / "inner" / "file").read_text() == "content"
    assert [path.name for path in target.parent.iterdir()] == ["folder"]


def test_an_error_of_safetensors_is_an_error_of_the_system(tmp_path):
    with pytest.raises(OSError, match=r"could not write .*folder: .*File too large"), new_folder(tmp_path / "folder"):
        raise SafetensorError("I/O error: File too large (os error 27)")
    assert not list(tmp_path.iterdir())


def test_an_empty_folder_is_filled(tmp_path):
    with new_folder(tmp_path) as folder:
        (folder / "file").write_text("")
    assert (tmp_path / "file").is_file()


@pytest.mark.parametrize("error", [ValueError(), OSError(), KeyboardInterrupt()])
def test_nothing_stays_after_an_error(tmp_path, error):
    def write():
        with new_folder(tmp_path / "folder") as folder:
            (folder / "file").write_text("")
            raise error

    with pytest.raises(type(error)):
        write()
    assert not list(tmp_path.iterdir())


def test_what_another_process_has_written_stays(tmp_path):
    target = tmp_path / "folder"

    def write():
        with new_folder(target):
            target.mkdir()
            (target / "file").write_text("kept")

    with pytest.raises(FolderFilledError, match="in the meantime"):
        write()
    assert (target / "file").read_text() == "kept"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_what_killed_processes_have_left_is_removed(tmp_path):
    left = tmp_path / f"{UNFINISHED}a[1]-{uuid.uuid4().hex}"
    others = [tmp_path / f"{UNFINISHED}{name}-{uuid.uuid4().hex}" for name in ("a", "a[1]-large", "a1")]
    for path in (left, *others):
        path.mkdir()
        (path / "file").write_text("")
    remove_unfinished(tmp_path / "a[1]")
    assert sorted(tmp_path.iterdir()) == sorted(others)


def test_what_a_running_process_writes_stays(tmp_path):
    code = (
        "import sys\nfrom pathlib import Path\nfrom bmoe_lightning.utils.new_folder import new_folder\n"
        f"with new_folder(Path({str(tmp_path / 'a')!r})):\n    print('ready', flush=True)\n    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        remove_unfinished(tmp_path / "a")
        assert len(list(tmp_path.glob(f"{UNFINISHED}*"))) == 1
        process.stdin.close()
        assert process.wait() == 0
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_files_are_as_readable_as_their_folder(tmp_path):
    with new_folder(tmp_path / "model") as folder:
        folder.chmod(0o755)
        save_file({"weight": torch.zeros(2)}, folder / "model.safetensors")  # for its owner alone
        (folder / "config.json").write_text("{}")
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()} == {0o644}
