"""Outputs that cannot be written: each is refused in a sentence that names what was given."""

from __future__ import annotations

import errno
import os

import pytest
from predict_cases import names_in, run, without_model
from serving_cases import rows_of, write_rows
from unprivileged import unprivileged_folder

from bmoe_lightning.command import predict as command
from bmoe_lightning.command.partial_file import check_place, locked


@pytest.mark.parametrize("options", [(), ("--overwrite",)])
def test_folders_and_files_in_the_way_are_named(data, tmp_path, monkeypatch, capsys, options):
    without_model(monkeypatch)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "out.jsonl.partial").mkdir()
    before = names_in(tmp_path)
    for name, found in {
        "file/out.jsonl": f"cannot be written, since {tmp_path / 'file'} is a file and no folder; give another name",
        "file/below/out.jsonl": f"cannot be written, since {tmp_path / 'file'} is a file and no folder",
        "folder.jsonl": "is a folder; give the name of a file",
        "out.jsonl": f"has its unfinished predictions in {tmp_path / 'out.jsonl.partial'}, and there is a folder",
    }.items():
        assert run("gone", data, tmp_path / name, *options) == 1
        assert f"error: --output {tmp_path / name} {found}" in capsys.readouterr().err
    assert names_in(tmp_path) == before


def test_a_folder_that_cannot_be_read_is_named():
    with unprivileged_folder() as folder:
        (folder / "closed").mkdir(mode=0o600)
        output = folder / "closed" / "new" / "out.jsonl"
        with pytest.raises(OSError, match="Permission denied") as error:
            check_place(output)
    assert str(error.value).startswith(f"--output {output} cannot be written (Permission denied); check")


@pytest.mark.parametrize("name", ["out.jsonl", "new/out.jsonl"])
def test_a_folder_that_cannot_be_written_to_is_named(name):
    with unprivileged_folder() as folder:
        folder.chmod(0o500)
        output = folder / name
        with pytest.raises(OSError, match="Permission denied") as error, locked(output):
            pass
    said = (
        f"--output {output} cannot be written (Permission denied); check the permissions of the folder {output.parent}"
    )
    assert str(error.value).startswith(said)


def test_a_partial_file_that_cannot_be_read_is_that_of_the_output():
    with unprivileged_folder() as folder:
        (folder / "out.jsonl.partial").touch(mode=0o200)
        with pytest.raises(OSError, match=r"--output .*out\.jsonl cannot be written"), locked(folder / "out.jsonl"):
            pass


def test_a_full_disk_is_said_and_what_is_finished_stays(saved, tmp_path, monkeypatch, capsys):
    def full(path, lines):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"{path}.1-2.tmp")

    data, output = write_rows(tmp_path / "q.jsonl", rows_of()), tmp_path / "out.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(command, "write_prediction_file", full)
        assert run(saved, data, output, "--method", "map") == 1
    said = capsys.readouterr().err
    assert f"error: --output {output} cannot be written (No space left on device); check" in said
    assert "tmp" not in said.replace(str(tmp_path), "")
    assert run(saved, data, output, "--method", "map") == 0
