"""A fit on disk: an index and the files that it names, each with the fit's id and a SHA-256 digest of its content.

    index.json                        description of the fit, and the name and digest of every other file
    methods-<random>.safetensors      the small states of all methods, as `{name}/{key}`
    state-<method>-<random>.safetensors   a large state of one method, by key
    posterior.safetensors             the first curvature, at the prior precision of the first method that has one
    posterior-<curvature>-<random>.safetensors   any further curvature
    snapshots/...                     trained weights after the last epochs

Every write creates files under new names, replaces the index, and only then removes the files that the previous index
named: whenever a writer is killed, the folder has either the previous or the new fit, complete. The first curvature too
is written under a new name and renamed to `posterior.safetensors` after the index was replaced; a reader accepts both
names, and completes the rename.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor

from bmoe_lightning.experts import ExpertLayer
from bmoe_lightning.experts.data_record import DataRecord
from bmoe_lightning.experts.weight_record import WeightRecord
from bmoe_lightning.laplace import storage as posterior_storage
from bmoe_lightning.laplace.posterior import LaplacePosterior
from bmoe_lightning.methods import snapshots as snapshot_storage
from bmoe_lightning.methods.base import State
from bmoe_lightning.methods.fit_result import FitResult, FittedMethod
from bmoe_lightning.methods.snapshots import snapshot_info
from bmoe_lightning.methods.stored_values import stored_calibration, stored_options, stored_texts
from bmoe_lightning.utils.atomic_io import remove_all_leftovers, remove_leftovers
from bmoe_lightning.utils.file_header import DamagedFileError, FileHeader, damaged, is_file
from bmoe_lightning.utils.json_io import read_json_file, write_json_file
from bmoe_lightning.utils.messages import shown_path
from bmoe_lightning.utils.safetensors_io import (
    SealedTensors,
    file_origin,
    has_content,
    opened_tensor_file,
    read_tensor_file,
    remove_tensor_file,
    seal_tensors,
    write_sealed,
)

INDEX_FILE = "index.json"
POSTERIOR_FILE = "posterior.safetensors"
SNAPSHOT_FOLDER = "snapshots"
_INDEX_FORMAT = "fit index"
_METHODS_FORMAT = "methods"
_STATE_FORMAT = "method state"
_VERSION = 1
_REMEDY = "fit again"
_CALIBRATION = ".calibration"  # no method name starts with a dot
_WEIGHTS = ".weights"
_TRAINING = ".training"
_LARGE = 1 << 20  # bytes: a state above this has a file of its own, which adding a method does not rewrite
_KINDS = {"methods": _METHODS_FORMAT, "state": _STATE_FORMAT, "posterior": posterior_storage.FORMAT}
_NEW_NAME = re.compile(r"(methods|state|posterior)(-\w+)?-[0-9a-f]{12}\.safetensors")  # see `_Writer`
_VERSIONS = {
    _METHODS_FORMAT: _VERSION,
    _STATE_FORMAT: _VERSION,
    posterior_storage.FORMAT: posterior_storage.VERSION,
    snapshot_storage.FORMAT: snapshot_storage.VERSION,
}  # fmt: skip
_Entry = dict[str, Any]  # file and digest of its content


def save_fit(folder: Path, fit: FitResult, snapshots: Sequence[Path] = ()) -> None:
    """Write a fit; files of an earlier write of the same fit whose content is the same are not written again.

    Args:
        folder: Folder of the fit; created if missing.
        fit: The fit.
        snapshots: Snapshots of the trained weights after the last epochs, files within `folder`.

    Raises:
        OSError: If a file cannot be written; `load_fit` then reads the previous fit of the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    before = _previous_index(folder)
    write = _Writer(folder, before, fit.fit_id)
    large = {name: fitted.state for name, fitted in fit.methods.items() if _num_bytes(fitted.state) > _LARGE}
    entries = {
        name: write(f"state-{name}", seal_tensors(state, format=_STATE_FORMAT, **_common(fit)))
        for name, state in large.items()
    }
    small = {name: fitted.state for name, fitted in fit.methods.items() if name not in large}
    if fit.calibration is not None:
        logits, labels = fit.calibration
        small[_CALIBRATION] = {"logits": logits} | ({} if labels is None else {"labels": labels})
    if fit.weights is not None:
        small[_WEIGHTS] = fit.weights.tensors()
    if fit.training is not None:
        small[_TRAINING] = fit.training.tensors()
    tensors = {f"{name}/{key}": value for name, state in small.items() for key, value in state.items()}
    content: dict[str, Any] = {
        "fingerprint": fit.fingerprint,
        "layers": [asdict(layer) for layer in fit.layers],
        "seed": fit.seed,
        "warnings": list(fit.warnings),
        "methods": {
            name: {
                "options": dict(fitted.options),
                "curvatures": list(fitted.curvatures),
                "warnings": list(fitted.warnings),
            }
            | ({"state": entries[name]} if name in entries else {})
            for name, fitted in fit.methods.items()
        },
        "states": write("methods", seal_tensors(tensors, format=_METHODS_FORMAT, **_common(fit))),
        "posteriors": {digest: _write_curvature(write, fit, digest) for digest in fit.posteriors},
        "snapshots": [
            {"file": path.relative_to(folder).as_posix(), "sha256": snapshot_info(path).digest} for path in snapshots
        ],
        "num_snapshots": len(snapshots),
    }
    content["superseded"] = _superseded(folder, before, content, fit.fit_id)
    write_json_file(folder / INDEX_FILE, format=_INDEX_FORMAT, version=_VERSION, description=content, fit=fit.fit_id)
    for entry in content["posteriors"].values():
        _path_of(folder, entry)  # renames the first one
    _remove(folder, content, fit.fit_id)


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
        return _read_index(folder / INDEX_FILE).fit
    except (OSError, ValueError):
        return ""


def stored_snapshots(folder: Path) -> list[Path]:
    """The snapshots that the index in a folder names; empty if there is none, or it is damaged."""
    header = _previous_index(folder)
    return [] if header is None else [_inside(folder, entry["file"]) for entry in header.description["snapshots"]]


def remove_leftover_files(folder: Path) -> None:
    """Remove what processes left that were killed while they wrote a fit: temporary files, and files of no index.

    Args:
        folder: Folder of a fit that no other process writes; it need not exist.
    """
    remove_all_leftovers(folder)
    remove_all_leftovers(folder / SNAPSHOT_FOLDER)
    header = _previous_index(folder)
    if not folder.is_dir() or (header is None and has_fit(folder)):
        return  # the files of a damaged index may help to repair it
    named = set() if header is None else {entry["file"] for entry in _entries(header.description)}
    for path in folder.iterdir():
        kind = _NEW_NAME.fullmatch(path.name)
        if kind is not None and path.name not in named:
            remove_tensor_file(path, format=_KINDS[kind[1]])


def load_fit(folder: Path, *, offload: Collection[str] = ()) -> tuple[FitResult, list[Path]]:
    """Read a fit and the paths of its snapshots.

    Args:
        folder: Folder of the fit.
        offload: Digests of the curvatures whose factors are offloaded to the CPU; see `LaplacePosterior`.

    Raises:
        ValueError: If a file is damaged, has another version, or belongs to another fit than the index.
        FileNotFoundError: If the index or a file that it names is missing.
        OSError: If a file cannot be read, such as a `PermissionError`.
    """
    header = _read_index(folder / INDEX_FILE)
    content = header.description
    with _refusing_damage(folder):
        states = _load_states(folder, header)
        files = {
            name: str(_path_of(folder, entry.get("state", content["states"])))
            for name, entry in content["methods"].items()
        }
        methods = {
            name: FittedMethod(
                states.get(name, {}),
                stored_options(entry),
                stored_texts(entry["curvatures"]),
                stored_texts(entry.get("warnings", [])),
                files[name],
            )
            for name, entry in content["methods"].items()
        }
        posteriors = {
            digest: _load_curvature(folder, digest, entry, header.fit, offload=digest in offload)
            for digest, entry in content["posteriors"].items()
        }
        layers = _layers(content)
        snapshots = [_checked_snapshot(folder, entry, header.fit) for entry in content["snapshots"]]
        if content.get("num_snapshots", len(snapshots)) != len(snapshots):
            raise TypeError(f"{len(snapshots)} snapshots of {content['num_snapshots']!r}")
        weights = WeightRecord.from_tensors(states.get(_WEIGHTS, {}))
        fingerprint, seed = content["fingerprint"], content["seed"]
        warnings = stored_texts(content.get("warnings", []))
        if not isinstance(fingerprint, str) or type(seed) is not int or seed < 0:
            raise TypeError(f"fingerprint {fingerprint!r}, seed {seed!r}")
    try:
        calibration = stored_calibration(states.get(_CALIBRATION))
        training = DataRecord.from_tensors(states[_TRAINING]) if _TRAINING in states else None
    except ValueError as error:
        raise damaged(_path_of(folder, content["states"]), _METHODS_FORMAT, str(error), _REMEDY) from error
    parts = (methods, posteriors, seed, calibration, weights, warnings, training)
    return FitResult(header.fit, fingerprint, layers, *parts), snapshots


def load_identity(folder: Path) -> FitResult:
    """Read the id of a fit, and what the weights of a model are compared with, without its methods and curvatures.

    Raises:
        ValueError: If a file is damaged, has another version, or belongs to another fit than the index.
        OSError: If a file is missing or cannot be read.
    """
    header = _read_index(folder / INDEX_FILE)
    with _refusing_damage(folder):
        content = header.description
        path = _path_of(folder, content["states"])
        with opened_tensor_file(path, format=_METHODS_FORMAT, version=_VERSION, remedy=_REMEDY) as file:
            _check_belongs(path, (file.fit, file.digest), header.fit, content["states"]["sha256"])
            prefix = f"{_WEIGHTS}/"
            names = [name for name in file.shapes if name.startswith(prefix)]
            weights = WeightRecord.from_tensors({name.removeprefix(prefix): file.read(name) for name in names})
        if not isinstance(content["fingerprint"], str):
            raise TypeError(f"fingerprint {content['fingerprint']!r}")
        return FitResult(header.fit, content["fingerprint"], _layers(content), weights=weights)


@contextmanager
def _refusing_damage(folder: Path) -> Iterator[None]:
    """Raise a `ValueError` with the path of the index for any content that no fit has."""
    path = folder / INDEX_FILE
    try:
        yield
    except DamagedFileError:
        raise
    except (KeyError, TypeError, AttributeError) as error:
        raise damaged(path, _INDEX_FORMAT, f"it is incomplete ({error!r})", _REMEDY) from error
    except ValueError as error:
        raise error if str(folder) in str(error) else damaged(path, _INDEX_FORMAT, str(error), _REMEDY) from error


def _layers(content: Mapping[str, Any]) -> tuple[ExpertLayer, ...]:
    return tuple(posterior_storage.described_layer(layer) for layer in content["layers"])


def _read_index(path: Path) -> FileHeader:
    return read_json_file(path, format=_INDEX_FORMAT, version=_VERSION, remedy=_REMEDY)


def _common(fit: FitResult) -> dict[str, Any]:
    return {"version": _VERSION, "description": {}, "fit": fit.fit_id}


def _num_bytes(state: State) -> int:
    return sum(value.numel() * value.element_size() for value in state.values())


class _Writer:
    """Writes files under new names, unless an earlier write of the same fit has left one of the same content."""

    def __init__(self, folder: Path, before: FileHeader | None, fit_id: str) -> None:
        self._folder = folder
        entries = _entries(before.description) if before is not None and before.fit == fit_id else ()
        self._before = {entry["sha256"]: entry for entry in entries}

    def __call__(self, stem: str, sealed: SealedTensors, *, served: bool = False) -> _Entry:
        earlier = self._before.get(sealed.digest)
        if earlier is not None and bool(earlier.get("served")) == served:
            kind = file_origin(path := _path_of(self._folder, earlier))
            if kind and has_content(path, sealed.digest, format=kind.format, version=_VERSIONS.get(kind.format, 0)):
                return earlier
        name = f"{stem}-{uuid.uuid4().hex[:12]}.safetensors"
        write_sealed(self._folder / name, sealed)
        return {"file": name, "sha256": sealed.digest} | ({"served": True} if served else {})


def _write_curvature(write: _Writer, fit: FitResult, digest: str) -> _Entry:
    posterior = fit.served_posterior(digest)
    sealed = posterior_storage.sealed_posterior(
        posterior.factors,
        posterior.prior_precision,
        posterior.prior_mean,
        description={"curvature": digest},
        fit=fit.fit_id,
    )
    return write(f"posterior-{digest}", sealed, served=digest == next(iter(fit.posteriors)))


def _entries(content: Mapping[str, Any]) -> Iterator[_Entry]:
    """The files that an index names."""
    yield content["states"]
    yield from (method["state"] for method in content["methods"].values() if "state" in method)
    yield from content["posteriors"].values()
    yield from content["snapshots"]


def _path_of(folder: Path, entry: Mapping[str, Any]) -> Path:
    """The path of a file that an index names; `posterior.safetensors` is renamed if its writer was killed before."""
    path = _inside(folder, entry["file"])
    if not entry.get("served"):
        return path
    served = folder / POSTERIOR_FILE
    origin = file_origin(served)
    if is_file(path) and (origin is None or origin.digest != entry["sha256"]):
        # Another rank may do the same; a folder that cannot be written to is read as it is.
        with suppress(OSError):
            path.replace(served)
    return path if is_file(path) else served


def _previous_index(folder: Path) -> FileHeader | None:
    """The index that a write will replace; None if there is none, or it is damaged."""
    try:
        header = _read_index(folder / INDEX_FILE)
        for entry in _entries(header.description):
            _inside(folder, entry["file"]), str(entry["sha256"])
        for entry in header.description.get("superseded", []):
            _inside(folder, entry["file"]), str(entry["fit"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return header


def _superseded(folder: Path, before: FileHeader | None, content: Mapping[str, Any], fit_id: str) -> list[_Entry]:
    """The files to remove once the index is replaced: those it named, without the snapshots of other fits.

    The new index lists them, so that the next write removes what this one did not come to.
    """
    if before is None:
        return []
    named = {entry["file"] for entry in _entries(content)}
    found = [{"file": entry["file"], "fit": before.fit} for entry in _entries(before.description)]
    if not content["posteriors"] and any(entry.get("served") for entry in before.description["posteriors"].values()):
        found.append({"file": POSTERIOR_FILE, "fit": before.fit})
    snapshots = {entry["file"] for entry in before.description["snapshots"]} if before.fit != fit_id else set()
    found = [entry for entry in found if entry["file"] not in named | snapshots]
    left = before.description.get("superseded", [])
    return found + [entry for entry in left if entry["file"] not in named and is_file(_inside(folder, entry["file"]))]


def _remove(folder: Path, content: Mapping[str, Any], fit_id: str) -> None:
    """Remove the superseded files, and what killed writes of this fit left."""
    for entry in content["superseded"]:
        origin = file_origin(path := _inside(folder, entry["file"]))
        if origin is not None and origin.format in _VERSIONS:
            remove_tensor_file(path, format=origin.format, fit=entry["fit"])
    named = {entry["file"] for entry in _entries(content)}
    for path in folder.iterdir():
        target = path.name[1:].rsplit(".", 2)[0] if path.name.endswith(".tmp") else path.name
        kind = _NEW_NAME.fullmatch(target)
        if kind is None or target in named:
            continue
        if target != path.name:
            remove_leftovers(path.with_name(target))
        else:
            remove_tensor_file(path, format=_KINDS[kind[1]], fit=fit_id)


def _load_states(folder: Path, header: FileHeader) -> dict[str, dict[str, Tensor]]:
    """The states of all methods by name, and the records of weights and data beside them."""
    states: dict[str, dict[str, Tensor]] = {}
    for name, value in _load_tensors(folder, header.description["states"], _METHODS_FORMAT, header.fit).items():
        method, _, key = name.partition("/")
        states.setdefault(method, {})[key] = value
    for method, entry in header.description["methods"].items():
        if "state" in entry:
            states[method] = _load_tensors(folder, entry["state"], _STATE_FORMAT, header.fit)
    return states


def _load_tensors(folder: Path, entry: Mapping[str, Any], format: str, fit_id: str) -> dict[str, Tensor]:
    path = _path_of(folder, entry)
    file = read_tensor_file(path, format=format, version=_VERSION, remedy=_REMEDY)
    _check_belongs(path, (file.fit, file.digest), fit_id, entry["sha256"])
    return file.tensors


def _load_curvature(
    folder: Path, digest: str, entry: Mapping[str, Any], fit_id: str, *, offload: bool
) -> LaplacePosterior:
    path = _path_of(folder, entry)
    stored = posterior_storage.load_posterior(path)
    _check_belongs(path, (stored.fit, stored.digest), fit_id, entry["sha256"])
    if stored.description.get("curvature") != digest:
        raise ValueError(
            f"{path} has the curvature {stored.description.get('curvature')!r}, and the {INDEX_FILE} of its folder "
            f"names it for {digest!r}; fit again"
        )
    return LaplacePosterior(stored.factors, stored.prior_precision, prior_mean=stored.prior_mean, offload=offload)


def _checked_snapshot(folder: Path, entry: Mapping[str, str], fit_id: str) -> Path:
    path = _inside(folder, entry["file"])
    info = snapshot_info(path)
    _check_belongs(path, (info.fit, info.digest), fit_id, entry["sha256"])
    return path


def _check_belongs(path: Path, found: tuple[str, str], fit_id: str, sha256: str) -> None:
    if found != (fit_id, sha256):
        raise ValueError(
            f"{path} and the {INDEX_FILE} of its folder belong to different fits. Copy all files of one fit, "
            "or fit again."
        )


def _inside(folder: Path, name: str) -> Path:
    """Path of a file in the folder; raises `ValueError` for a name that points outside of it."""
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts or not relative.parts or "\0" in name:
        raise ValueError(f"{folder / INDEX_FILE} names {name!r}, which is not a file in its folder; fit again")
    return folder / relative
