"""Files of weights: one, or several with an index."""

from __future__ import annotations

import json
import os
import stat

import torch
from safetensors.torch import load_file

from recipes.upcycle.shards import write_shards

TENSOR = torch.arange(8.0)
TENSORS = [("a", TENSOR), ("b", TENSOR[:2]), ("c", TENSOR.view(2, 4).T), ("d", torch.zeros(0, 3))]


def test_one_file(tmp_path):
    assert write_shards(tmp_path, TENSORS) == 4 * 18
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    found = load_file(tmp_path / "model.safetensors")
    assert list(found) == ["a", "b", "c", "d"]
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS)


def test_several_files_and_their_index(tmp_path):
    assert write_shards(tmp_path, TENSORS, shard_bytes=40) == 4 * 18
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*names, "model.safetensors.index.json"]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index == {
        "metadata": {"total_size": 72},
        "weight_map": {"a": names[0], "b": names[0], "c": names[1], "d": names[1]},
    }
    for name, tensor in TENSORS:
        assert torch.equal(load_file(tmp_path / index["weight_map"][name])[name], tensor)


def test_only_one_shard_is_in_memory(tmp_path):
    alive = []

    def tensors():
        for i in range(6):
            alive.append(len(list(tmp_path.glob("shard-*"))))
            yield f"t{i}", torch.zeros(10)

    write_shards(tmp_path, tensors(), shard_bytes=80)
    assert alive == [0, 0, 0, 1, 1, 2]


def test_a_file_has_the_permissions_of_others(tmp_path):
    earlier = os.umask(0o022)
    try:
        folder = tmp_path / "folder"
        folder.mkdir()
        write_shards(folder, TENSORS)
    finally:
        os.umask(earlier)
    assert stat.S_IMODE((folder / "model.safetensors").stat().st_mode) == 0o644
