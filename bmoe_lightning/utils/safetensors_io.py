"""Tensors with a description on disk: safetensors files, written whole or not at all. Nothing in them is executed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bmoe_lightning.utils.atomic_io import replaced_file


def write_safetensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors to a temporary file beside `path`, then rename it: a full disk leaves the old file as it was.

    Raises:
        OSError: if the file cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with replaced_file(path) as temporary:
            permissions = temporary.stat().st_mode
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, dict(metadata))
            temporary.chmod(permissions)  # safetensors lets nobody but the owner read what it writes
    except SafetensorError as error:
        raise OSError(f"could not write {path}: {error}; the file that was there before is unchanged") from error


def read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read all tensors of a file, on the CPU, and its metadata.

    Raises:
        ValueError: if it is no safetensors file, or is cut short.
        OSError: if there is no such file, or it cannot be read.
    """
    with opened_safetensors(path) as file:
        # Cloned for their alignment: tensors in a file begin anywhere, and matrix kernels care.
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  (no mapping)
        return tensors, file.metadata() or {}


@contextmanager
def opened_safetensors(path: str | Path) -> Iterator[Any]:
    """Open a file, to read its tensors one by one, on the CPU.

    Raises:
        ValueError: if it is no safetensors file, or is cut short.
        OSError: if there is no such file, or it cannot be read.
    """
    try:
        opened = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(
            f"{path} is no complete safetensors file ({error}); was the download or copy cut off?"
        ) from error
    with opened as file:
        yield file
