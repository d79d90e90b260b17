"""The folder of a fit: its index, the files that this names, and those that no index names.

Every write creates files under new names, replaces the index, and only then removes the files that the previous index
named: whenever a writer is killed, the folder has either the previous or the new fit, complete. The first curvature too
is written under a new name and renamed to `posterior.safetensors` after the index was replaced; a reader accepts both
names, and completes the rename.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from bmoe_lightning.laplace import storage as posterior_storage
from bmoe_lightning.methods import snapshots as snapshot_storage
from bmoe_lightning.utils.atomic_io import remove_all_leftovers, remove_leftovers
from bmoe_lightning.utils.file_header import FileHeader, is_file
from bmoe_lightning.utils.json_io import read_json_file, write_json_file
from bmoe_lightning.utils.messages import shown_path
from bmoe_lightning.utils.safetensors_io import file_origin, remove_tensor_file

INDEX_FILE = "index.json"
POSTERIOR_FILE = "posterior.safetensors"
SNAPSHOT_FOLDER = "snapshots"
INDEX_FORMAT = "fit index"
METHODS_FORMAT = "methods"
STATE_FORMAT = "method state"
VERSION = 1
REMEDY = "fit again"
FILE_VERSIONS = {
    METHODS_FORMAT: VERSION,
    STATE_FORMAT: VERSION,
    posterior_storage.FORMAT: posterior_storage.VERSION,
    snapshot_storage.FORMAT: snapshot_storage.VERSION,
}
"""Version of each format of the files that an index names."""

Entry = dict[str, Any]
"""File and digest of its content."""

_KINDS = {"methods": METHODS_FORMAT, "state": STATE_FORMAT, "posterior": posterior_storage.FORMAT}
_NEW_NAME = re.compile(r"(methods|state|posterior)(-\w+)?-[0-9a-f]{12}\.safetensors")  # see `new_name`


def has_fit(folder: Path) -> bool:
    """Whether `save_fit` wrote into a folder; False also for one that cannot be entered (see `unreadable`)."""
    return is_file(folder / INDEX_FILE)


def unreadable(folder: Path) -> OSError | None:
    """The error that says why it is unknown whether a folder has a fit, such as a `PermissionError`; None if it is."""
    try:
        (folder / INDEX_FILE).stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        kind, reason = (type(error), error.strerror) if isinstance(error, OSError) else (OSError, error)
        return kind(
            f"the folder {shown_path(folder)} of a fit cannot be read ({reason}). Give this user permission to enter "
            "and read it, or pass dirpath= with another folder."
        )
    return None


def stored_fit_id(folder: Path) -> str | None:
    """The id of the fit in a folder; empty if its index is damaged, None if there is no fit."""
    if not has_fit(folder):
        return None
    try:
        return read_index(folder / INDEX_FILE).fit
    except (OSError, ValueError):
        return ""


def stored_snapshots(folder: Path) -> list[Path]:
    """The snapshots that the index in a folder names; empty if there is none, or it is damaged."""
    header = previous_index(folder)
    return [] if header is None else [inside(folder, entry["file"]) for entry in header.description["snapshots"]]


def remove_leftover_files(folder: Path) -> None:
    """Remove what processes left that were killed while they wrote a fit: temporary files, and files of no index.

    Args:
        folder: Folder of a fit that no other process writes; it need not exist.
    """
    remove_all_leftovers(folder)
    remove_all_leftovers(folder / SNAPSHOT_FOLDER)
    header = previous_index(folder)
    if not folder.is_dir() or (header is None and has_fit(folder)):
        return  # the files of a damaged index may help to repair it
    named = set() if header is None else {entry["file"] for entry in named_entries(header.description)}
    for path in folder.iterdir():
        kind = _NEW_NAME.fullmatch(path.name)
        if kind is not None and path.name not in named:
            remove_tensor_file(path, format=_KINDS[kind[1]])


def new_name(stem: str) -> str:
    """A file name that no earlier write has used.

    Args:
        stem: What the file is: `methods`, or `state` or `posterior` with whatever tells it from others.
    """
    return f"{stem}-{uuid.uuid4().hex[:12]}.safetensors"


def write_index(folder: Path, content: Mapping[str, Any], fit_id: str) -> None:
    """Replace the index of a folder; from then on it has this fit.

    Raises:
        OSError: If it cannot be written; the previous one is unchanged.
    """
    write_json_file(folder / INDEX_FILE, format=INDEX_FORMAT, version=VERSION, description=content, fit=fit_id)


def read_index(path: Path) -> FileHeader:
    """Read an index.

    Raises:
        FileNotFoundError: If there is none.
        OSError: If it cannot be read.
        ValueError: If it is damaged, or has another version.
    """
    return read_json_file(path, format=INDEX_FORMAT, version=VERSION, remedy=REMEDY)


def named_entries(content: Mapping[str, Any]) -> Iterator[Entry]:
    """The files that an index names."""
    yield content["states"]
    yield from (method["state"] for method in content["methods"].values() if "state" in method)
    yield from content["posteriors"].values()
    yield from content["snapshots"]


def path_of(folder: Path, entry: Mapping[str, Any]) -> Path:
    """The path of a file that an index names; `posterior.safetensors` is renamed if its writer was killed before."""
    path = inside(folder, entry["file"])
    if not entry.get("served"):
        return path
    served = folder / POSTERIOR_FILE
    origin = file_origin(served)
    if is_file(path) and (origin is None or origin.digest != entry["sha256"]):
        # Another rank may do the same; a folder that cannot be written to is read as it is.
        with suppress(OSError):
            path.replace(served)
    return path if is_file(path) else served


def previous_index(folder: Path) -> FileHeader | None:
    """The index that a write will replace; None if there is none, or it is damaged."""
    try:
        header = read_index(folder / INDEX_FILE)
        for entry in named_entries(header.description):
            inside(folder, entry["file"]), str(entry["sha256"])
        for entry in header.description.get("superseded", []):
            inside(folder, entry["file"]), str(entry["fit"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return header


def superseded_files(folder: Path, before: FileHeader | None, content: Mapping[str, Any], fit_id: str) -> list[Entry]:
    """The files to remove once the index is replaced: those it named, without the snapshots of other fits.

    The new index lists them, so that the next write removes what this one did not come to.
    """
    if before is None:
        return []
    named = {entry["file"] for entry in named_entries(content)}
    found = [{"file": entry["file"], "fit": before.fit} for entry in named_entries(before.description)]
    if not content["posteriors"] and any(entry.get("served") for entry in before.description["posteriors"].values()):
        found.append({"file": POSTERIOR_FILE, "fit": before.fit})
    snapshots = {entry["file"] for entry in before.description["snapshots"]} if before.fit != fit_id else set()
    found = [entry for entry in found if entry["file"] not in named | snapshots]
    left = before.description.get("superseded", [])
    return found + [entry for entry in left if entry["file"] not in named and is_file(inside(folder, entry["file"]))]


def remove_superseded(folder: Path, content: Mapping[str, Any], fit_id: str) -> None:
    """Remove the superseded files, and what killed writes of this fit left."""
    for entry in content["superseded"]:
        origin = file_origin(path := inside(folder, entry["file"]))
        if origin is not None and origin.format in FILE_VERSIONS:
            remove_tensor_file(path, format=origin.format, fit=entry["fit"])
    named = {entry["file"] for entry in named_entries(content)}
    for path in folder.iterdir():
        target = path.name[1:].rsplit(".", 2)[0] if path.name.endswith(".tmp") else path.name
        kind = _NEW_NAME.fullmatch(target)
        if kind is None or target in named:
            continue
        if target != path.name:
            remove_leftovers(path.with_name(target))
        else:
            remove_tensor_file(path, format=_KINDS[kind[1]], fit=fit_id)


def inside(folder: Path, name: str) -> Path:
    """Path of a file that an index names; raises `ValueError` for a name that points outside of its folder."""
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts or not relative.parts or "\0" in name:
        raise ValueError(f"{folder / INDEX_FILE} names {name!r}, which is not a file in its folder; fit again")
    return folder / relative
