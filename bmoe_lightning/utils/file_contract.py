"""The contract test of the file formats of this package.

A file is complete or refused, is replaced atomically, and errors of its reader name the path and what to do.
"""

from __future__ import annotations

import dataclasses
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bmoe_lightning.utils.file_header import seal
from bmoe_lightning.utils.safetensors_io import METADATA_KEY

Write = Callable[[Path], object]
Read = Callable[[Path], object]


def check_file_format(write: Write, read: Read, tmp_path: Path, *, name: str = "sample.safetensors") -> None:
    """Check that a file format satisfies the contract of this package.

    Args:
        write: Function that writes a sample, always with the same content, to a path, and replaces an existing file.
        read: Function that reads a path and returns its content: tensors, mappings, sequences, dataclasses and plain
            values.
        tmp_path: Empty folder for temporary files.
        name: Name of the sample, `.safetensors` or `.json`.

    Raises:
        AssertionError: If the format breaks the contract; the message says how.
    """
    path = tmp_path / "folder" / name
    _check_round_trip(write, read, path)
    _check_interrupted_writes(write, path)
    _check_leftovers(write, path)
    _check_places(write, read, tmp_path / "places" / name)
    sample = path.read_bytes()
    _check_truncation(read, path, sample)
    _check_foreign(read, path)
    _check_headers(read, path, sample)
    _check_flipped_bits(read, path, sample)


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise AssertionError(sentence)


def _check_round_trip(write: Write, read: Read, path: Path) -> None:
    before = os.umask(0o027)
    try:
        write(path)
    finally:
        os.umask(before)
    _require(path.is_file(), "writing into a folder that does not exist yet must create the folder and the file")
    names = [found.name for found in path.parent.iterdir()]
    _require(names == [path.name], f"writing must leave nothing but the file in its folder, and left {names}")
    if os.name == "posix":
        mode = stat.S_IMODE(path.stat().st_mode)
        _require(mode == 0o640, f"a file must get the permissions of the umask (0o640), and has {mode:#o}")
    _require(same_content(read(path), read(path)), "reading a file twice must give the same content")


def _check_interrupted_writes(write: Write, path: Path) -> None:
    old = path.read_bytes()
    for function in ("os.fsync", "os.replace"):
        for error in (OSError(28, "No space left on device"), KeyboardInterrupt()):
            raised = None
            with mock.patch(function, side_effect=error):
                try:
                    write(path)
                except (OSError, KeyboardInterrupt) as found:
                    raised = found
            _require(raised is not None, f"a write must call {function} before it is done, and raise what that raises")
            _require(path.read_bytes() == old, f"a write that {function} interrupts must leave the old file unchanged")
            names = [found.name for found in path.parent.iterdir()]
            _require(names == [path.name], f"a write that {function} interrupts must leave no temporary file: {names}")


def _check_leftovers(write: Write, path: Path) -> None:
    leftover = path.with_name(f".{path.name}.0123456789abcdef.tmp")
    others = [path.with_name(f".other{path.suffix}.0123456789abcdef.tmp"), path.with_name(f".{path.name}.json")]
    for file in (leftover, *others):
        file.write_bytes(b"half")
    write(path)
    _require(not leftover.exists(), "a write must remove the temporary file that a killed writer left behind")
    for file in others:
        _require(file.exists(), f"a write must leave files of others alone, and removed {file.name}")
        file.unlink()


def _check_places(write: Write, read: Read, path: Path) -> None:
    path.parent.mkdir(parents=True)
    _check_error(read, path, "a missing file", FileNotFoundError)
    path.mkdir()
    _check_error(read, path, "a folder in the place of the file", IsADirectoryError)
    path.rmdir()
    path.symlink_to(path.name)  # exists and cannot be opened, not even by root
    error = _check_error(read, path, "a link to itself", OSError)
    _require(not isinstance(error, FileNotFoundError), "a file that cannot be opened must not be called missing")
    path.unlink()
    write(path)
    path.chmod(0)
    if not os.access(path, os.R_OK):
        _check_error(read, path, "an unreadable file", PermissionError)
    path.chmod(0o600)


def _check_truncation(read: Read, path: Path, sample: bytes) -> None:
    for share in (0.0, 0.01, 0.3, 0.6, 0.99):
        path.write_bytes(sample[: int(share * len(sample))])
        _check_error(read, path, f"a file truncated to {share:.0%}", ValueError)
    for missing in (1, 8, 100):
        path.write_bytes(sample[:-missing])
        if not (path.suffix == ".json" and not sample[-missing:].strip()):
            _check_error(read, path, f"a file without its last {missing} bytes", ValueError)


def _check_foreign(read: Read, path: Path) -> None:
    from safetensors.torch import save

    contents = {
        "a zip archive": b"PK\x03\x04 as torch.save writes it" * 10,
        "text": b"something else\n",
        "a JSON object": b'{"weight": 1}',
        "a JSON list": b"[1, 2]",
        "a safetensors file without metadata": save({"weight": torch.ones(2)}),
        "a safetensors file of another library": save({"weight": torch.ones(2)}, {"format": "pt"}),
        "a header that is not JSON": save({"weight": torch.ones(2)}, {METADATA_KEY: "{broken"}),
        "a header that is a list": save({"weight": torch.ones(2)}, {METADATA_KEY: "[1, 2]"}),
        "a deeply nested header": save({"weight": torch.ones(2)}, {METADATA_KEY: "[" * 100_000}),
    }
    for what, content in contents.items():
        path.write_bytes(content)
        _check_error(read, path, what, ValueError)


def _check_headers(read: Read, path: Path, sample: bytes) -> None:
    path.write_bytes(sample)
    content, header = read(path), header_of(sample)
    version = header["version"]

    path.write_bytes(with_header(sample, {**header, "format": "other thing"}))
    message = str(_check_error(read, path, "a file of another format", ValueError))
    _require("other thing" in message and header["format"] in message, f"must name both formats: {message}")
    path.write_bytes(with_header(sample, {**header, "version": version + 1}))
    message = str(_check_error(read, path, "a file of a newer version", ValueError))
    _require(f"version {version + 1}" in message and "Update" in message, f"must ask for an update: {message}")
    for other in (version - 1, None, "1"):
        path.write_bytes(with_header(sample, {**header, "version": other}))
        message = str(_check_error(read, path, f"a file of version {other!r}", ValueError))
        _require(f"version {other}" in message, f"must name the version {other!r}: {message}")
    for key in ("format", "version", "fit", "description", "tensors"):
        path.write_bytes(with_header(sample, {name: value for name, value in header.items() if name != key}))
        _check_error(read, path, f"a header without {key!r}", ValueError)
    for key in ("fit", "description"):
        path.write_bytes(with_header(sample, {**header, key: {"tampered": 1}}, sealed=False))
        _check_error(read, path, f"a header whose {key!r} was changed under the old digest", ValueError)

    description = {**header["description"], "added_later": {"a": [1]}}
    path.write_bytes(with_header(sample, {**header, "added_later": 1, "description": description}))
    found = read(path)
    # A digest is one of all that the header holds.
    _require(
        same_content(found, content, ignoring=("digest", "description")),
        "keys that a reader does not know must change nothing",
    )


def _check_flipped_bits(read: Read, path: Path, sample: bytes) -> None:
    path.write_bytes(sample)
    content = read(path)
    for position in _positions(sample):
        flipped = bytearray(sample)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        try:
            found = read(path)
        except ValueError as error:
            _require(str(path) in str(error), f"a refusal must name the path: {error}")
        except Exception as error:
            raise AssertionError(f"a flipped bit in byte {position} must be a ValueError, and is {error!r}") from error
        else:
            _require(same_content(found, content), f"a flipped bit in byte {position} must not go unnoticed")
    path.write_bytes(sample)


def _positions(sample: bytes, number: int = 150) -> Iterator[int]:
    """The bytes of the length, and evenly spaced ones of header and payload."""
    length = 8 + int.from_bytes(sample[:8], "little")
    start = length if length < len(sample) else len(sample) // 2
    yield from range(8)
    for first, last in ((8, start), (start, len(sample))):
        yield from range(first, last, max(1, (last - first) // number))


def _check_error(read: Read, path: Path, what: str, kind: type[Exception]) -> Exception:
    """The error that reading must raise."""
    try:
        read(path)
    except kind as error:
        _require(str(path) in str(error), f"the error for {what} must name the path: {error}")
        return error
    except Exception as error:
        raise AssertionError(f"{what} must raise {kind.__name__}, and raised {error!r}") from error
    raise AssertionError(f"{what} must raise {kind.__name__}, and was read")


def header_of(sample: bytes) -> dict[str, Any]:
    """The header of a file, without verifying it.

    Args:
        sample: Bytes of a file.

    Raises:
        ValueError, LookupError, TypeError: If the file has none.
    """
    if sample.startswith(b"{"):
        return dict(json.loads(sample))
    length = int.from_bytes(sample[:8], "little")
    header = json.loads(json.loads(sample[8 : 8 + length])["__metadata__"][METADATA_KEY])
    return dict(header)


def with_header(sample: bytes, header: Mapping[str, Any], *, sealed: bool = True) -> bytes:
    """The bytes of a file with another header.

    Args:
        sample: Bytes of a file.
        header: Fields of the header, as `file_header.seal` takes them.
        sealed: Whether the header gets its right digest, rather than the one among the fields.
    """
    text = seal(header)[0] if sealed else json.dumps(header)
    if sample.startswith(b"{"):
        return text.encode()
    length = int.from_bytes(sample[:8], "little")
    outer = json.loads(sample[8 : 8 + length])
    outer["__metadata__"][METADATA_KEY] = text
    written = json.dumps(outer).encode()
    written += b" " * (-len(written) % 8)
    return len(written).to_bytes(8, "little") + written + sample[8 + length :]


def same_content(one: Any, other: Any, *, ignoring: Sequence[str] = ()) -> bool:
    """Whether two contents are equal bit by bit.

    Args:
        one: Tensors, mappings, sequences, dataclasses and plain values.
        other: What it is compared with.
        ignoring: Names of fields of dataclasses that are not compared.
    """
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        same_kind = (one.dtype, one.shape) == (other.dtype, other.shape)
        return same_kind and torch.equal(_bits(one), _bits(other))
    if dataclasses.is_dataclass(one):
        names = [field.name for field in dataclasses.fields(one) if field.name not in ignoring]
        return all(same_content(getattr(one, name), getattr(other, name), ignoring=ignoring) for name in names)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(same_content(one[key], other[key], ignoring=ignoring) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(
            same_content(a, b, ignoring=ignoring) for a, b in zip(one, other, strict=True)
        )
    return bool(one == other)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
