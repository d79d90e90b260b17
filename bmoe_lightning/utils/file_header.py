"""The header of all files of this package: format, version, id of the fit, description and SHA-256 digests."""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bmoe_lightning.utils.messages import shown_path

REMEDY = "create the file again"
_DIGEST = "sha256"


@dataclass(frozen=True)
class FileHeader:
    """The fields of a header.

    Attributes:
        format: Name of the format in words, such as `posterior`.
        version: Version of the format.
        fit: Id of the fit that the file belongs to; empty if it belongs to none.
        description: Content in JSON; readers ignore unknown keys.
        tensors: SHA-256 digest of each tensor by name.
        digest: SHA-256 digest of all of the above, and so of the file's content.
    """

    format: str
    version: int
    fit: str
    description: dict[str, Any]
    tensors: dict[str, str]
    digest: str


def seal(fields: Mapping[str, Any]) -> tuple[str, str]:
    """Add the digest to the fields of a header.

    Args:
        fields: Fields `format`, `version`, `fit`, `description` and `tensors` (see `FileHeader`) as JSON values; a
            digest among them is replaced.

    Returns:
        The header as JSON text, and its digest.
    """
    plain = json.loads(json.dumps({key: value for key, value in fields.items() if key != _DIGEST}))
    digest = _digest(plain)
    return json.dumps({**plain, _DIGEST: digest}), digest


def parse_header(path: Path, text: str | bytes, *, format: str, version: int, remedy: str = REMEDY) -> FileHeader:
    """Parse and verify the JSON text of a header.

    Args:
        path: Path of the file, for messages.
        text: JSON text.
        format: Format that the reader expects.
        version: Version that the reader knows.
        remedy: What to do if the file cannot be used, the second half of a message's last sentence.

    Raises:
        ValueError: If the header is of another format or version, or does not match its digest.
    """
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise damaged(path, format, f"its header is not JSON ({error})", remedy) from error
    if not isinstance(fields, dict) or not isinstance(fields.get("format"), str):
        raise foreign(path, format)
    if fields["format"] != format:
        raise ValueError(
            f"{path} is a {fields['format']} file of bmoe_lightning, not a {format} file. Check the path, or {remedy}."
        )
    found = fields.get("version")
    if found != version:
        newer = isinstance(found, int) and found > version
        action = "Update bmoe_lightning" if newer else "Install the release of bmoe_lightning that wrote it"
        raise ValueError(
            f"{path} has version {found} of the {format} format, and this release of bmoe_lightning reads version "
            f"{version}. {action}, or {remedy}."
        )
    digest = fields.pop(_DIGEST, None)
    if digest != _digest(fields):
        raise damaged(path, format, "its header does not match its SHA-256 digest", remedy)
    try:
        return FileHeader(format, version, fields["fit"], dict(fields["description"]), dict(fields["tensors"]), digest)
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(path, format, f"its header is incomplete ({error!r})", remedy) from error


class DamagedFileError(ValueError):
    """A file is damaged, or was not written by this package."""


def foreign(path: Path, format: str) -> DamagedFileError:
    """The error for a file that this package has not written."""
    return DamagedFileError(f"{path} was not written by bmoe_lightning, so it is no {format} file. Check the path.")


def damaged(path: Path, format: str, reason: str, remedy: str = REMEDY) -> DamagedFileError:
    """The error for a file that is damaged or truncated."""
    return DamagedFileError(
        f"{path} is not a complete {format} file: {reason}. If it was copied or downloaded, do so again, or {remedy}."
    )


def check_readable(path: Path, format: str) -> None:
    """Open a file, so that a missing or unreadable one, or a folder, raises the corresponding error of Python.

    Raises:
        FileNotFoundError: If there is no such file.
        IsADirectoryError: If a folder has this path.
        OSError: If it cannot be opened, such as a `PermissionError`; the message names the path, and says what to do.
        ValueError: If no file can have this path.
    """
    try:
        mode = path.stat().st_mode
        if stat.S_ISREG(mode) or stat.S_ISDIR(mode):  # opening a pipe would wait for a writer
            with path.open("rb"):
                return
    except FileNotFoundError as error:
        what = f"{path} is a link to a file that does not exist" if path.is_symlink() else f"no {format} at {path}"
        raise FileNotFoundError(f"{what}. Check the path.") from error
    except IsADirectoryError as error:
        raise IsADirectoryError(f"{path} is a folder, not a {format} file. Check the path.") from error
    except PermissionError as error:
        raise PermissionError(
            f"{path} cannot be read ({error.strerror}). Give this user permission to read the file and to enter its "
            "folders."
        ) from error
    except OSError as error:
        raise type(error)(
            f"the {format} at {shown_path(path)} cannot be opened ({error.strerror}). Check the path."
        ) from error
    except ValueError as error:
        raise ValueError(f"{shown_path(path)} cannot be the path of a {format} ({error}). Check the path.") from error
    raise OSError(f"{path} is a pipe or a device, not a {format} file. Check the path.")


def is_file(path: Path) -> bool:
    """Whether there is a file that can be found; False also for a path that no file can have.

    Unlike `Path.is_file`, this raises nothing for a folder that this user cannot enter or a name that is too long.
    """
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (OSError, ValueError):
        return False


def _digest(fields: Mapping[str, Any]) -> str:
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
