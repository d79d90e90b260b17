"""Tensors with a description on disk: safetensors files, written atomically, with a SHA-256 digest of each tensor.

There is no pickle, so reading a file executes no code from it, and every tensor is verified before it is used for the
first time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bmoe_lightning.utils.atomic_io import replaced_file
from bmoe_lightning.utils.file_header import REMEDY, check_readable, damaged, foreign, is_file, parse_header, seal

METADATA_KEY = "bmoe_lightning"
_MAX_HEADER = 100_000_000  # bytes, the limit of safetensors itself


@dataclass(frozen=True)
class TensorFile:
    """The verified content of a file.

    Attributes:
        tensors: Tensors by name, on the CPU.
        description: Description by the writer, as JSON values.
        fit: Id of the fit that the file belongs to; empty if it belongs to none.
        digest: SHA-256 digest of the content, as `write_tensor_file` returned it.
    """

    tensors: dict[str, Tensor]
    description: dict[str, Any]
    fit: str
    digest: str


@dataclass(frozen=True)
class SealedTensors:
    """The content of a file before it is written.

    Attributes:
        tensors: Contiguous tensors by name, on the CPU.
        header: Header as JSON text.
        digest: SHA-256 digest of the content: of the header, which holds the digest of each tensor.
    """

    tensors: dict[str, Tensor]
    header: str
    digest: str


def seal_tensors(
    tensors: Mapping[str, Tensor], *, format: str, version: int, description: Mapping[str, Any], fit: str = ""
) -> SealedTensors:
    """Create the content of a file.

    Args:
        tensors: Tensors by name, on any device.
        format: Name of the format in words, such as `posterior`.
        version: Version of the format.
        description: Further content, as JSON values.
        fit: Id of the fit that the file belongs to.
    """
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    digests = {name: tensor_digest(name, tensor) for name, tensor in on_cpu.items()}
    header, digest = seal(
        {"format": format, "version": version, "fit": fit, "description": dict(description), "tensors": digests}
    )
    return SealedTensors(on_cpu, header, digest)


def write_sealed(path: str | Path, sealed: SealedTensors) -> None:
    """Write the content of a file atomically.

    Args:
        path: Target path; its folder is created if missing.
        sealed: Content from `seal_tensors`.

    Raises:
        OSError: If the file cannot be written; an existing file is unchanged.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with replaced_file(path) as temporary:
            permissions = temporary.stat().st_mode
            save_file(sealed.tensors, temporary, {METADATA_KEY: sealed.header})
            temporary.chmod(permissions)  # safetensors writes files that only their owner can read
    except SafetensorError as error:
        raise OSError(f"could not write {path}: {error}; an existing file is unchanged") from error


def write_tensor_file(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    *,
    format: str,
    version: int,
    description: Mapping[str, Any],
    fit: str = "",
) -> str:
    """Write tensors and a description atomically; arguments are those of `seal_tensors` and `write_sealed`.

    Returns:
        The SHA-256 digest of the content.

    Raises:
        OSError: If the file cannot be written; an existing file is unchanged.
    """
    sealed = seal_tensors(tensors, format=format, version=version, description=description, fit=fit)
    write_sealed(path, sealed)
    return sealed.digest


def read_tensor_file(path: str | Path, *, format: str, version: int, remedy: str = REMEDY) -> TensorFile:
    """Read and verify a file that `write_tensor_file` wrote.

    Args:
        path: Path of the file.
        format: Format that the file must have.
        version: Version that the file must have.
        remedy: What to do if the file cannot be used, the second half of a message's last sentence.

    Raises:
        FileNotFoundError: If there is no such file.
        OSError: If it cannot be read, such as a `PermissionError`.
        ValueError: If it is foreign, truncated, damaged, or of another format or version.
    """
    with opened_tensor_file(path, format=format, version=version, remedy=remedy) as file:
        tensors = {name: file.read(name) for name in file.shapes}
        return TensorFile(tensors, file.description, file.fit, file.digest)


class OpenedTensorFile:
    """A file whose header was verified, to read its tensors one by one; see `opened_tensor_file`.

    Attributes:
        shapes: Shape of each tensor by name.
        description: Description by the writer, as JSON values.
        fit: Id of the fit that the file belongs to.
        digest: SHA-256 digest of the content, provided that the tensors match theirs.
        tensor_digest: The same of the tensors alone, which files of several fits may share.
    """

    def __init__(self, path: Path, file: Any, *, format: str, version: int, remedy: str) -> None:
        metadata = file.metadata() or {}
        if METADATA_KEY not in metadata:
            raise foreign(path, format)
        header = parse_header(path, metadata[METADATA_KEY], format=format, version=version, remedy=remedy)
        self.shapes: dict[str, tuple[int, ...]] = {
            name: tuple(file.get_slice(name).get_shape())
            for name in file.keys()  # noqa: SIM118  (no mapping)
        }
        if self.shapes.keys() != header.tensors.keys():
            raise damaged(path, format, "its tensors are not those that its header lists", remedy)
        self.description, self.fit, self.digest = header.description, header.fit, header.digest
        self._path, self._file, self._format, self._remedy = path, file, format, remedy
        self.tensor_digest = hashlib.sha256(json.dumps(header.tensors, sort_keys=True).encode()).hexdigest()
        self._unverified = dict(header.tensors)

    def read(self, name: str, *, verify: bool = True) -> Tensor:
        """Read a tensor to the CPU; its digest is verified the first time.

        Args:
            name: Name of the tensor.
            verify: False if the caller has verified a file with this `digest`.

        Raises:
            OSError: If it cannot be read.
            ValueError: If it does not match its digest.
        """
        try:
            # Cloned for alignment: tensors in a file are not aligned, which matrix kernels require or prefer.
            tensor: Tensor = self._file.get_tensor(name).clone()
        except SafetensorError as error:
            raise OSError(f"could not read the tensor {name!r} from {self._path}: {error}") from error
        if verify and name in self._unverified:
            if tensor_digest(name, tensor) != self._unverified[name]:
                raise damaged(
                    self._path, self._format, f"the tensor {name!r} does not match its SHA-256 digest", self._remedy
                )
            del self._unverified[name]
        return tensor


@contextmanager
def opened_tensor_file(
    path: str | Path, *, format: str, version: int, remedy: str = REMEDY
) -> Iterator[OpenedTensorFile]:
    """Open a file and verify its header; tensors are verified as they are read.

    Arguments and errors are those of `read_tensor_file`.
    """
    path = Path(path)
    # safetensors reports every file that it cannot open as not found.
    check_readable(path, format)
    try:
        opened = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise damaged(path, format, str(error), remedy) from error
    with opened as file:
        yield OpenedTensorFile(path, file, format=format, version=version, remedy=remedy)


@dataclass(frozen=True)
class FileOrigin:
    """What the header of a file says about it, even if its tensors are truncated or damaged.

    Attributes:
        format: Name of the format.
        fit: Id of the fit that the file belongs to.
        digest: SHA-256 digest of the content.
    """

    format: str
    fit: str
    digest: str


def file_origin(path: str | Path) -> FileOrigin | None:
    """Read the header of a safetensors file without verifying it.

    Returns:
        The origin; None if there is no readable file, or this package has not written it.
    """
    if not is_file(Path(path)):
        return None
    try:
        with Path(path).open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(length) if length <= _MAX_HEADER else b""
        header = json.loads(json.loads(text)["__metadata__"][METADATA_KEY])
        found = [header["format"], header.get("fit", ""), header.get("sha256", "")]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    return FileOrigin(*found) if all(isinstance(value, str) for value in found) else None


def has_content(path: str | Path, digest: str, *, format: str, version: int) -> bool:
    """Whether a file is complete and has the content with this digest; all tensors are read and verified."""
    try:
        with opened_tensor_file(path, format=format, version=version) as file:
            if file.digest != digest:
                return False
            for name in file.shapes:
                file.read(name)
    except (OSError, ValueError):
        return False
    return True


def remove_tensor_file(path: str | Path, *, format: str, fit: str | None = None) -> bool:
    """Remove a file if its header names this format, and this fit if one is given; any other file is left unchanged.

    Returns:
        Whether it was removed.
    """
    origin = file_origin(path)
    if origin is None or origin.format != format or fit not in (None, origin.fit):
        return False
    Path(path).unlink(missing_ok=True)
    return True


def tensor_digest(name: str, tensor: Tensor) -> str:
    """SHA-256 digest of a tensor's name, dtype, shape and values."""
    running = hashlib.sha256(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
    running.update(tensor_bytes(tensor))
    return running.hexdigest()


def tensor_bytes(tensor: Tensor) -> Any:
    """The values of a dense tensor as a uint8 array in row-major order, without a copy of a contiguous CPU tensor."""
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    if flat.stride(0) != 1:  # a single value that was expanded
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8).numpy()
