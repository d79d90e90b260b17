"""A fit on disk: an index and the files that it names, each with the fit's id and a SHA-256 digest of its content.

    index.json                        description of the fit, and the name and digest of every other file
    methods-<random>.safetensors      the states of all methods, as `{name}/{key}`
    posterior.safetensors             the first curvature, at the prior precision of the first method that has one
    posterior-<curvature>.safetensors any further curvature
    snapshots/...                     trained weights after the last epochs

The index is replaced last, so that a reader finds either the previous or the new fit, and never parts of both.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor

from bmoe_lightning.experts import ExpertLayer
from bmoe_lightning.laplace.posterior import LaplacePosterior
from bmoe_lightning.laplace.storage import load_posterior, save_posterior
from bmoe_lightning.methods.fit_result import FitResult, FittedMethod
from bmoe_lightning.methods.snapshots import snapshot_info
from bmoe_lightning.utils.file_header import FileHeader, damaged
from bmoe_lightning.utils.json_io import read_json_file, write_json_file
from bmoe_lightning.utils.safetensors_io import read_tensor_file, remove_tensor_file, write_tensor_file

INDEX_FILE = "index.json"
POSTERIOR_FILE = "posterior.safetensors"
SNAPSHOT_FOLDER = "snapshots"
_INDEX_FORMAT = "fit index"
_METHODS_FORMAT = "methods"
_VERSION = 1
_REMEDY = "fit again"
_CALIBRATION = ".calibration"  # no method name starts with a dot


def save_fit(folder: Path, fit: FitResult, snapshots: Sequence[Path] = ()) -> None:
    """Write a fit; a curvature that was already written at the same prior precision is not written again.

    Args:
        folder: Folder of the fit; created if missing.
        fit: The fit.
        snapshots: Snapshots of the trained weights after the last epochs, files within `folder`.

    Raises:
        OSError: If a file cannot be written; the files that an existing index names are unchanged, unless a curvature
            was being replaced, in which case `load_fit` raises `ValueError`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    before = _index_of_same_fit(folder, fit.fit_id)
    # A run that was resumed after its fit has the same id but other weights.
    same_weights = before.get("fingerprint") == fit.fingerprint
    methods_file = f"methods-{uuid.uuid4().hex[:12]}.safetensors"
    tensors = {f"{name}/{key}": value for name, fitted in fit.methods.items() for key, value in fitted.state.items()}
    if fit.calibration is not None:
        logits, labels = fit.calibration
        tensors |= {f"{_CALIBRATION}/logits": logits} | ({} if labels is None else {f"{_CALIBRATION}/labels": labels})
    sha256 = write_tensor_file(
        folder / methods_file,
        tensors,
        format=_METHODS_FORMAT,
        version=_VERSION,
        description={"methods": list(fit.methods)},
        fit=fit.fit_id,
    )
    # Last of the large files: posterior.safetensors is overwritten in place, which invalidates the previous index.
    posteriors = dict(before["posteriors"]) if same_weights else {}
    for digest in fit.posteriors:
        posteriors[digest] = _save_curvature(folder, fit, digest, written=posteriors)
    content = {
        "fingerprint": fit.fingerprint,
        "layers": [asdict(layer) for layer in fit.layers],
        "seed": fit.seed,
        "methods": {
            name: {
                "options": dict(fitted.options),
                "curvatures": list(fitted.curvatures),
                "warnings": list(fitted.warnings),
            }
            for name, fitted in fit.methods.items()
        },
        "states": {"file": methods_file, "sha256": sha256},
        "posteriors": posteriors,
        "snapshots": [
            {"file": path.relative_to(folder).as_posix(), "sha256": snapshot_info(path).digest} for path in snapshots
        ],
    }
    write_json_file(folder / INDEX_FILE, format=_INDEX_FORMAT, version=_VERSION, description=content, fit=fit.fit_id)
    if before:
        remove_tensor_file(_inside(folder, before["states"]["file"]), format=_METHODS_FORMAT)


def has_fit(folder: Path) -> bool:
    """Whether `save_fit` wrote into a folder."""
    return (folder / INDEX_FILE).is_file()


def stored_fit_id(folder: Path) -> str | None:
    """The id of the fit in a folder; empty if its index is damaged, None if there is no fit."""
    if not has_fit(folder):
        return None
    try:
        return _read_index(folder / INDEX_FILE).fit
    except (OSError, ValueError):
        return ""


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
    path = folder / INDEX_FILE
    header = _read_index(path)
    content = header.description
    try:
        states = _load_states(folder, header)
        methods = {
            name: FittedMethod(
                states.get(name, {}), dict(entry["options"]), tuple(entry["curvatures"]), _warnings(entry)
            )
            for name, entry in content["methods"].items()
        }
        posteriors = {
            digest: _load_curvature(folder, entry, header.fit, offload=digest in offload)
            for digest, entry in content["posteriors"].items()
        }
        layers = tuple(ExpertLayer(**layer) for layer in content["layers"])
        snapshots = [_checked_snapshot(folder, entry, header.fit) for entry in content["snapshots"]]
        held_out = states.get(_CALIBRATION)
        calibration = None if held_out is None else (held_out["logits"], held_out.get("labels"))
        fit = FitResult(header.fit, content["fingerprint"], layers, methods, posteriors, content["seed"], calibration)
    except (KeyError, TypeError, AttributeError) as error:
        raise damaged(path, _INDEX_FORMAT, f"it is incomplete ({error!r})", _REMEDY) from error
    return fit, snapshots


def _read_index(path: Path) -> FileHeader:
    return read_json_file(path, format=_INDEX_FORMAT, version=_VERSION, remedy=_REMEDY)


def _index_of_same_fit(folder: Path, fit_id: str) -> Mapping[str, Any]:
    """The index of an earlier write of this fit, or an empty mapping."""
    try:
        header = _read_index(folder / INDEX_FILE)
    except (OSError, ValueError):
        return {}  # missing, or not an index: it is replaced at the end
    content = header.description
    names = [entry["file"] for entry in content.get("posteriors", {}).values()]
    return content if header.fit == fit_id and all((folder / name).is_file() for name in names) else {}


def _save_curvature(folder: Path, fit: FitResult, digest: str, *, written: Mapping[str, Any]) -> dict[str, Any]:
    """Write a curvature unless it was written at the same prior precision; returns its entry in the index."""
    served = fit.served_posterior(digest)
    precision = served.prior_precision.tolist()
    before = written.get(digest)
    if before is not None and before["prior_precision"] == precision:
        return dict(before)
    first = all(entry["file"] != POSTERIOR_FILE for entry in written.values())
    name = before["file"] if before else POSTERIOR_FILE if first else f"posterior-{digest}.safetensors"
    sha256 = save_posterior(
        folder / name,
        served.factors,
        served.prior_precision,
        served.prior_mean,
        description={"curvature": digest},
        fit=fit.fit_id,
    )
    return {"file": name, "sha256": sha256, "prior_precision": precision}


def _load_states(folder: Path, header: FileHeader) -> dict[str, dict[str, Tensor]]:
    entry = header.description["states"]
    path = _inside(folder, entry["file"])
    file = read_tensor_file(path, format=_METHODS_FORMAT, version=_VERSION, remedy=_REMEDY)
    _check_belongs(path, (file.fit, file.digest), header.fit, entry["sha256"])
    states: dict[str, dict[str, Tensor]] = {}
    for name, value in file.tensors.items():
        method, _, key = name.partition("/")
        states.setdefault(method, {})[key] = value
    return states


def _warnings(entry: Mapping[str, Any]) -> tuple[str, ...]:
    sentences = entry.get("warnings", [])  # absent in files of earlier releases
    if not isinstance(sentences, list) or not all(isinstance(sentence, str) for sentence in sentences):
        raise TypeError(f"warnings must be a list of sentences, got {sentences!r}")
    return tuple(sentences)


def _load_curvature(folder: Path, entry: Mapping[str, Any], fit_id: str, *, offload: bool) -> LaplacePosterior:
    path = _inside(folder, entry["file"])
    stored = load_posterior(path)
    _check_belongs(path, (stored.fit, stored.digest), fit_id, entry["sha256"])
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
    if relative.is_absolute() or ".." in relative.parts or not relative.parts:
        raise ValueError(f"{folder / INDEX_FILE} names {name!r}, which is not a file in its folder; fit again")
    return folder / relative
