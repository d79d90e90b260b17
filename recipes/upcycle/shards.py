"""Safetensors files of a model whose tensors come one after the other."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

SHARD_BYTES = 1024**3
"""Size of the tensors that are held in memory before they are written."""


def write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int = SHARD_BYTES) -> int:
    """Write tensors as transformers does: `model.safetensors`, or several files and their index.

    Args:
        folder: Existing folder.
        tensors: Names and tensors, which may share memory.
        shard_bytes: Largest size of a file, unless one tensor is larger.

    Returns:
        The size of all tensors in bytes.
    """
    files: list[tuple[Path, list[str]]] = []
    shard: dict[str, Tensor] = {}
    total = held = 0

    def flush() -> None:
        path = folder / f"shard-{len(files)}"
        save_file(shard, path, {"format": "pt"})
        path.chmod(folder.stat().st_mode & 0o666)  # safetensors creates files that only their owner can read
        files.append((path, list(shard)))
        shard.clear()

    for name, tensor in tensors:
        if shard and held + tensor.nbytes > shard_bytes:
            flush()
            held = 0
        # A copy: safetensors refuses tensors that share memory.
        shard[name] = tensor.detach().clone(memory_format=torch.contiguous_format)
        held += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(files) == 1:
        files[0][0].rename(folder / "model.safetensors")
        return total
    weight_map: dict[str, str] = {}
    for number, (path, names) in enumerate(files, 1):
        target = path.with_name(f"model-{number:05d}-of-{len(files):05d}.safetensors")
        path.rename(target)
        weight_map |= dict.fromkeys(names, target.name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return total
