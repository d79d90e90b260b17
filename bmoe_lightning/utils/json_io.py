"""JSON files with the header of this package: a description without tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bmoe_lightning.utils.atomic_io import write_text
from bmoe_lightning.utils.file_header import REMEDY, FileHeader, check_readable, parse_header, seal


def write_json_file(
    path: str | Path, *, format: str, version: int, description: Mapping[str, Any], fit: str = ""
) -> str:
    """Write a description atomically.

    Args:
        path: Target path; its folder is created if missing.
        format: Name of the format in words.
        version: Version of the format.
        description: Content, in values that JSON has.
        fit: Id of the fit that the file belongs to.

    Returns:
        The SHA-256 digest of the content.

    Raises:
        OSError: If the file cannot be written; an existing file is unchanged.
    """
    path = Path(path)
    fields = {"format": format, "version": version, "fit": fit, "description": dict(description), "tensors": {}}
    text, digest = seal(fields)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(json.loads(text), indent=2) + "\n")
    return digest


def read_json_file(path: str | Path, *, format: str, version: int, remedy: str = REMEDY) -> FileHeader:
    """Read what `write_json_file` wrote; arguments are those of `read_tensor_file`.

    Raises:
        FileNotFoundError: If there is no such file.
        OSError: If it cannot be read.
        ValueError: If it is foreign, damaged, or of another format or version.
    """
    path = Path(path)
    check_readable(path, format)
    return parse_header(path, path.read_bytes(), format=format, version=version, remedy=remedy)
