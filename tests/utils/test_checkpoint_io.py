"""Checkpoints of Lightning are read without creating objects, and damaged ones are told from unsafe ones."""

from __future__ import annotations

import io
import types

import pytest
import torch

from bmoe_lightning.utils.checkpoint_io import UnsafeCheckpointError, check_safe, read_checkpoint
from bmoe_lightning.utils.file_header import DamagedFileError


def read(path):
    return read_checkpoint(path, "checkpoint of a test", remedy="train again")


def saved(path, content):
    torch.save(content, path)
    return path


def test_is_read_as_it_was_saved(tmp_path):
    content = {"state_dict": {"weight": torch.arange(3.0), "_extra_state": {"rate": 0.5}}, "epoch": 3}
    found = read(saved(tmp_path / "last.ckpt", content))
    assert found["epoch"] == 3
    assert torch.equal(found["state_dict"]["weight"], torch.arange(3.0))
    assert found["state_dict"]["_extra_state"] == {"rate": 0.5}


def test_the_format_before_zip_files_is_read(tmp_path):
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": {"weight": torch.arange(3.0)}}, path, _use_new_zipfile_serialization=False)
    assert torch.equal(read(path)["state_dict"]["weight"], torch.arange(3.0))
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DamagedFileError, match="is damaged, or no checkpoint of Lightning"):
        read(path)


def test_objects_are_named_and_not_created(tmp_path):
    path = saved(tmp_path / "last.ckpt", {"state_dict": {}, "config": types.SimpleNamespace()})
    sentence = r"the checkpoint of a test .*last.ckpt contains objects of types.SimpleNamespace.*, or train again\.$"
    with pytest.raises(UnsafeCheckpointError, match=sentence):
        read(path)
    for file in (path, path.open("rb"), io.BytesIO(path.read_bytes())):
        with pytest.raises(UnsafeCheckpointError, match=r"these are objects of types.SimpleNamespace"):
            check_safe(file, "these are", remedy="train again")
    check_safe(tmp_path / "missing.ckpt", "these are", remedy="train again")


@pytest.mark.parametrize("content", [{}, [1], {"state_dict": [1]}, 3])
def test_what_has_no_state_dict_is_no_checkpoint(tmp_path, content):
    with pytest.raises(DamagedFileError, match="no checkpoint of Lightning"):
        read(saved(tmp_path / "last.ckpt", content))
