"""The header of every file: sealed, and refused in one sentence that names the file."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from unprivileged import unprivileged_folder

from bmoe_lightning.utils.file_header import DamagedFileError, check_readable, is_file, parse_header, seal

PATH = Path("folder/file")
FIELDS = {"format": "sample", "version": 2, "fit": "f", "description": {"é": [1, None]}, "tensors": {"a": "00"}}


def parse(text, version=2):
    return parse_header(PATH, text, format="sample", version=version, remedy="fit again")


def test_comes_back_as_it_was():
    text, digest = seal(FIELDS)
    header = parse(text)
    assert (header.format, header.version, header.fit, header.digest) == ("sample", 2, "f", digest)
    assert (header.description, header.tensors) == (FIELDS["description"], FIELDS["tensors"])
    assert seal({**FIELDS, "sha256": "old"}) == (text, digest)


def test_order_and_spaces_do_not_matter_and_values_do():
    text, digest = seal(FIELDS)
    spread = json.dumps(dict(reversed(json.loads(text).items())), indent=3)
    assert parse(spread).digest == digest
    for key in FIELDS:
        assert seal({name: value for name, value in FIELDS.items() if name != key})[1] != digest


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not JSON"),
        (b"\xff", "not JSON"),
        ("[1]", "not written by bmoe_lightning"),
        ('{"format": 3}', "not written by bmoe_lightning"),
        (seal({**FIELDS, "format": "other"})[0], "other file of bmoe_lightning, not a sample file"),
        (seal({**FIELDS, "version": 3})[0], "version 3 .*Update bmoe_lightning"),
        (seal({**FIELDS, "version": 1})[0], "version 1 .*Install the release"),
        (seal(FIELDS)[0].replace('"f"', '"g"'), "does not match its SHA-256"),
        (seal({key: value for key, value in FIELDS.items() if key != "tensors"})[0], "incomplete"),
    ],
)
def test_refusals(text, said):
    with pytest.raises(ValueError, match=rf"folder/file .*{said}"):
        parse(text)


def test_a_damaged_file_is_told_from_one_of_another_version():
    with pytest.raises(DamagedFileError):
        parse("{")
    with pytest.raises(ValueError, match="Update") as error:
        parse(seal({**FIELDS, "version": 3})[0])
    assert not isinstance(error.value, DamagedFileError)


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("missing", FileNotFoundError, "no sample at .*/missing. Check the path"),
        (".", IsADirectoryError, "is a folder, not a sample file"),
        ("file/sample", NotADirectoryError, "sample at .* cannot be opened .Not a directory.. Check the path"),
        ("dangling", FileNotFoundError, "dangling is a link to a file that does not exist"),
        ("loop", OSError, "cannot be opened .Too many levels"),
        ("x" * 5000, OSError, r"xxx\.\.\. cannot be opened .File name too long"),
        ("a\0b", ValueError, r"a.x00b' cannot be the path of a sample"),
        ("pipe", OSError, "is a pipe or a device, not a sample file"),
    ],
)
def test_places_that_cannot_be_opened(tmp_path, name, error, said):
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(error, match=said) as caught:
        check_readable(tmp_path / name, "sample")
    assert len(str(caught.value)) < 600
    assert not is_file(tmp_path / name)


def test_a_file_that_cannot_be_read():
    with unprivileged_folder() as folder:
        path = folder / "a" / "sample"
        path.parent.mkdir()
        path.write_text("x")
        assert is_file(path)
        path.chmod(0)
        with pytest.raises(PermissionError, match=rf"{path} cannot be read .Permission denied.. Give this user"):
            check_readable(path, "sample")
        path.chmod(0o600)
        check_readable(path, "sample")
        path.parent.chmod(0)
        assert not is_file(path)
        with pytest.raises(PermissionError, match=rf"{path} cannot be read .Permission denied.. Give this user"):
            check_readable(path, "sample")
