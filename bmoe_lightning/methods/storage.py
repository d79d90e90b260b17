"""A fit on disk: an index and the files that it names, each with the fit's id and a SHA-256 digest of its content.

    index.json                        description of the fit, and the name and digest of every other file
    methods-<random>.safetensors      the small states of all methods, as `{name}/{key}`
    state-<method>-<random>.safetensors   a large state of one method, by key
    posterior.safetensors             the first curvature, at the prior precision of the first method that has one
    posterior-<curvature>-<random>.safetensors   any further curvature
    snapshots/...                     trained weights after the last epochs

`fit_index.py` has the rules by which a folder has one complete fit at any time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from bmoe_lightning.curvature.factors import share_equal_layers
from bmoe_lightning.experts import ExpertLayer
from bmoe_lightning.experts.data_record import DataRecord
from bmoe_lightning.experts.weight_record import WeightRecord
from bmoe_lightning.laplace import storage as posterior_storage
from bmoe_lightning.laplace.posterior import LaplacePosterior
from bmoe_lightning.methods.base import State
from bmoe_lightning.methods.fit_index import (
    FILE_VERSIONS,
    INDEX_FILE,
    INDEX_FORMAT,
    METHODS_FORMAT,
    REMEDY,
    STATE_FORMAT,
    VERSION,
    Entry,
    inside,
    named_entries,
    new_name,
    path_of,
    previous_index,
    read_index,
    remove_superseded,
    superseded_files,
    write_index,
)
from bmoe_lightning.methods.fit_result import FitResult, FittedMethod
from bmoe_lightning.methods.snapshots import snapshot_info
from bmoe_lightning.methods.stored_values import (
    stored_calibration,
    stored_options,
    stored_shares,
    stored_sizes,
    stored_texts,
)
from bmoe_lightning.utils.file_header import DamagedFileError, FileHeader, damaged
from bmoe_lightning.utils.safetensors_io import (
    SealedTensors,
    file_origin,
    has_content,
    opened_tensor_file,
    read_tensor_file,
    seal_tensors,
    write_sealed,
)

_CALIBRATION = ".calibration"  # no method name starts with a dot
_WEIGHTS = ".weights"
_TRAINING = ".training"
_LARGE = 1 << 20  # bytes: a state above this has a file of its own, which adding a method does not rewrite


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
    before = previous_index(folder)
    write = _Writer(folder, before, fit.fit_id)
    large = {name: fitted.state for name, fitted in fit.methods.items() if _num_bytes(fitted.state) > _LARGE}
    entries = {
        name: write(f"state-{name}", seal_tensors(state, format=STATE_FORMAT, **_common(fit)))
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
                "limited_terms": dict(fitted.limited_terms),
            }
            | ({"state": entries[name]} if name in entries else {})
            for name, fitted in fit.methods.items()
        },
        "states": write("methods", seal_tensors(tensors, format=METHODS_FORMAT, **_common(fit))),
        "posteriors": {digest: _write_curvature(write, fit, digest) for digest in fit.posteriors},
        "gradient_shares": {digest: asdict(share) for digest, share in fit.shares.items()},
        "num_gradient_shares": len(fit.shares),
        "snapshots": [
            {"file": path.relative_to(folder).as_posix(), "sha256": snapshot_info(path).digest} for path in snapshots
        ],
        "num_snapshots": len(snapshots),
    }
    content["superseded"] = superseded_files(folder, before, content, fit.fit_id)
    write_index(folder, content, fit.fit_id)
    for entry in content["posteriors"].values():
        path_of(folder, entry)  # renames the first one
    remove_superseded(folder, content, fit.fit_id)


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
    header = read_index(folder / INDEX_FILE)
    content = header.description
    with _refusing_damage(folder):
        states = _load_states(folder, header)
        files = {
            name: str(path_of(folder, entry.get("state", content["states"])))
            for name, entry in content["methods"].items()
        }
        methods = {
            name: FittedMethod(
                states.get(name, {}),
                stored_options(entry),
                stored_texts(entry["curvatures"]),
                stored_texts(entry.get("warnings", [])),
                stored_sizes(entry.get("limited_terms", {})),
                files[name],
            )
            for name, entry in content["methods"].items()
        }
        posteriors = _load_curvatures(folder, header, offload)
        layers = _layers(content)
        snapshots = [_checked_snapshot(folder, entry, header.fit) for entry in content["snapshots"]]
        if content.get("num_snapshots", len(snapshots)) != len(snapshots):
            raise TypeError(f"{len(snapshots)} snapshots of {content['num_snapshots']!r}")
        weights = WeightRecord.from_tensors(states.get(_WEIGHTS, {}))
        fingerprint, seed = content["fingerprint"], content["seed"]
        warnings = stored_texts(content.get("warnings", []))
        shares = stored_shares(content.get("gradient_shares", {}))
        if content.get("num_gradient_shares", 0) != len(shares) or not shares.keys() <= posteriors.keys():
            raise TypeError(f"gradient shares of {sorted(shares)}, and {content.get('num_gradient_shares')!r} of them")
        if not isinstance(fingerprint, str) or type(seed) is not int or seed < 0:
            raise TypeError(f"fingerprint {fingerprint!r}, seed {seed!r}")
    try:
        calibration = stored_calibration(states.get(_CALIBRATION))
        training = DataRecord.from_tensors(states[_TRAINING]) if _TRAINING in states else None
    except ValueError as error:
        raise damaged(path_of(folder, content["states"]), METHODS_FORMAT, str(error), REMEDY) from error
    parts = (methods, posteriors, seed, calibration, weights, warnings, training, shares)
    return FitResult(header.fit, fingerprint, layers, *parts), snapshots


def load_identity(folder: Path) -> FitResult:
    """Read the id of a fit, and what the weights of a model are compared with, without its methods and curvatures.

    Raises:
        ValueError: If a file is damaged, has another version, or belongs to another fit than the index.
        OSError: If a file is missing or cannot be read.
    """
    header = read_index(folder / INDEX_FILE)
    with _refusing_damage(folder):
        content = header.description
        path = path_of(folder, content["states"])
        with opened_tensor_file(path, format=METHODS_FORMAT, version=VERSION, remedy=REMEDY) as file:
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
        raise damaged(path, INDEX_FORMAT, f"it is incomplete ({error!r})", REMEDY) from error
    except ValueError as error:
        raise error if str(folder) in str(error) else damaged(path, INDEX_FORMAT, str(error), REMEDY) from error


def _layers(content: Mapping[str, Any]) -> tuple[ExpertLayer, ...]:
    return tuple(posterior_storage.described_layer(layer) for layer in content["layers"])


def _common(fit: FitResult) -> dict[str, Any]:
    return {"version": VERSION, "description": {}, "fit": fit.fit_id}


def _num_bytes(state: State) -> int:
    return sum(value.numel() * value.element_size() for value in state.values())


class _Writer:
    """Writes files under new names, unless an earlier write of the same fit has left one of the same content."""

    def __init__(self, folder: Path, before: FileHeader | None, fit_id: str) -> None:
        self._folder = folder
        entries = named_entries(before.description) if before is not None and before.fit == fit_id else ()
        self._before = {entry["sha256"]: entry for entry in entries}

    def __call__(self, stem: str, sealed: SealedTensors, *, served: bool = False) -> Entry:
        earlier = self._before.get(sealed.digest)
        if earlier is not None and bool(earlier.get("served")) == served:
            kind = file_origin(path := path_of(self._folder, earlier))
            if kind and has_content(path, sealed.digest, format=kind.format, version=FILE_VERSIONS.get(kind.format, 0)):
                return earlier
        name = new_name(stem)
        write_sealed(self._folder / name, sealed)
        return {"file": name, "sha256": sealed.digest} | ({"served": True} if served else {})


def _write_curvature(write: _Writer, fit: FitResult, digest: str) -> Entry:
    posterior = fit.served_posterior(digest)
    sealed = posterior_storage.sealed_posterior(
        posterior.factors,
        posterior.prior_precision,
        posterior.prior_mean,
        description={"curvature": digest},
        fit=fit.fit_id,
    )
    return write(f"posterior-{digest}", sealed, served=digest == next(iter(fit.posteriors)))


def _load_states(folder: Path, header: FileHeader) -> dict[str, dict[str, Tensor]]:
    """The states of all methods by name, and the records of weights and data beside them."""
    states: dict[str, dict[str, Tensor]] = {}
    for name, value in _load_tensors(folder, header.description["states"], METHODS_FORMAT, header.fit).items():
        method, _, key = name.partition("/")
        states.setdefault(method, {})[key] = value
    for method, entry in header.description["methods"].items():
        if "state" in entry:
            states[method] = _load_tensors(folder, entry["state"], STATE_FORMAT, header.fit)
    return states


def _load_tensors(folder: Path, entry: Mapping[str, Any], format: str, fit_id: str) -> dict[str, Tensor]:
    path = path_of(folder, entry)
    file = read_tensor_file(path, format=format, version=VERSION, remedy=REMEDY)
    _check_belongs(path, (file.fit, file.digest), fit_id, entry["sha256"])
    return file.tensors


def _load_curvatures(folder: Path, header: FileHeader, offload: Collection[str]) -> dict[str, LaplacePosterior]:
    entries = header.description["posteriors"]
    stored = {digest: _load_curvature(folder, digest, entry, header.fit) for digest, entry in entries.items()}
    factors = dict(zip(stored, share_equal_layers([file.factors for file in stored.values()]), strict=True))
    return {
        digest: LaplacePosterior(
            factors[digest], file.prior_precision, prior_mean=file.prior_mean, offload=digest in offload
        )
        for digest, file in stored.items()
    }


def _load_curvature(
    folder: Path, digest: str, entry: Mapping[str, Any], fit_id: str
) -> posterior_storage.StoredPosterior:
    path = path_of(folder, entry)
    stored = posterior_storage.load_posterior(path)
    _check_belongs(path, (stored.fit, stored.digest), fit_id, entry["sha256"])
    if stored.description.get("curvature") != digest:
        raise ValueError(
            f"{path} has the curvature {stored.description.get('curvature')!r}, and the {INDEX_FILE} of its folder "
            f"names it for {digest!r}; fit again"
        )
    return stored


def _checked_snapshot(folder: Path, entry: Mapping[str, str], fit_id: str) -> Path:
    path = inside(folder, entry["file"])
    info = snapshot_info(path)
    _check_belongs(path, (info.fit, info.digest), fit_id, entry["sha256"])
    return path


def _check_belongs(path: Path, found: tuple[str, str], fit_id: str, sha256: str) -> None:
    if found != (fit_id, sha256):
        raise ValueError(
            f"{path} and the {INDEX_FILE} of its folder belong to different fits. Copy all files of one fit, "
            "or fit again."
        )
