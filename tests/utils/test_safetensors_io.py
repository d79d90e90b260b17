"""Tensors with a description on disk."""

from __future__ import annotations

import pytest
import torch

from bmoe_lightning.utils.safetensors_io import read_safetensors, write_safetensors


def test_views_and_graphs_are_written(tmp_path):
    base = torch.arange(6.0, requires_grad=True)
    write_safetensors(tmp_path / "x", {"a": base.view(2, 3).T, "b": base[:2]}, {"k": "v"})
    tensors, metadata = read_safetensors(tmp_path / "x")
    assert torch.equal(tensors["a"], base.detach().view(2, 3).T)
    assert torch.equal(tensors["b"], base.detach()[:2])
    assert metadata == {"k": "v"}


def test_a_file_without_a_description(tmp_path):
    write_safetensors(tmp_path / "x", {"a": torch.ones(1)}, {})
    assert read_safetensors(tmp_path / "x")[1] == {}


def test_what_is_read_can_be_changed_and_is_aligned(tmp_path):
    write_safetensors(tmp_path / "x", {"a": torch.ones(3, dtype=torch.uint8), "b": torch.ones(5)}, {"k": "an odd size"})
    tensors, _ = read_safetensors(tmp_path / "x")
    assert tensors["b"].data_ptr() % 64 == 0
    tensors["b"] += 1
    assert torch.equal(read_safetensors(tmp_path / "x")[0]["b"], torch.ones(5))


@pytest.mark.parametrize("content", [b"", b"no tensors", None])
def test_a_damaged_file_is_refused(tmp_path, content):
    path = tmp_path / "x"
    write_safetensors(path, {"a": torch.ones(100)}, {})
    path.write_bytes(path.read_bytes()[:-1] if content is None else content)
    with pytest.raises(ValueError, match="x is no complete safetensors file"):
        read_safetensors(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_safetensors(tmp_path / "x")
