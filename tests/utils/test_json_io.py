"""Descriptions in JSON files; `tests/test_file_contract.py` holds them to the contract of all files."""

from __future__ import annotations

import json

import pytest

from bmoe_lightning.utils.json_io import read_json_file, write_json_file

KIND = {"format": "sample index", "version": 1}


def test_is_read_as_it_was_written_and_by_people(tmp_path):
    path = tmp_path / "new" / "index.json"
    description = {"b": [1.5, None, "é"], "a": {"z": 1}}
    digest = write_json_file(path, description=description, fit="f", **KIND)
    header = read_json_file(path, **KIND)
    assert (header.description, header.fit, header.digest) == (description, "f", digest)
    assert list(header.description) == ["b", "a"]  # the order is content to some readers
    text = path.read_text()
    assert text.count("\n") > 8
    assert json.loads(text)["description"] == description


def test_an_edit_by_hand_is_noticed(tmp_path):
    path = tmp_path / "index.json"
    write_json_file(path, description={"seed": 1}, **KIND)
    path.write_text(path.read_text().replace('"seed": 1', '"seed": 2'))
    with pytest.raises(ValueError, match=r"index.json .*does not match its SHA-256 digest.*fit again"):
        read_json_file(path, **KIND, remedy="fit again")


def test_what_json_cannot_hold_is_an_error_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError):
        write_json_file(tmp_path / "index.json", description={"a": object()}, **KIND)
    assert not list(tmp_path.iterdir())
