"""What was fitted, on disk: `posterior.safetensors` and `methods.json` in one folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bmoe_lightning.laplace.posterior import LaplacePosterior
from bmoe_lightning.methods.options import FittedState
from bmoe_lightning.methods.workbench import Fitted
from bmoe_lightning.utils.atomic_io import write_text

POSTERIOR_FILE = "posterior.safetensors"
STATE_FILE = "methods.json"
CURVATURE_STATE_FILE = "curvature.safetensors"  # while the curvature is being collected
_VERSION = 1


def save_fitted(folder: Path, fitted: Fitted, snapshots: Sequence[Path] = ()) -> None:
    """Write what was fitted; each file is replaced whole, the posterior first.

    Args:
        folder: created if missing.
        fitted: from `fit`.
        snapshots: files of the checkpoint ensemble, within `folder`.

    Raises:
        OSError: if a file cannot be written; the old one stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if fitted.posterior is not None:
        fitted.posterior.save(folder / POSTERIOR_FILE)
    content = {
        "version": _VERSION,
        "fingerprint": fitted.fingerprint,
        "settings": dict(fitted.settings),
        "posterior": None if fitted.posterior is None else fitted.posterior.factors.fingerprint,
        "fitted": asdict(fitted.state),
        "snapshots": [str(path.relative_to(folder)) for path in snapshots],
    }
    write_text(folder / STATE_FILE, json.dumps(content, indent=2) + "\n")


def has_fitted(folder: Path) -> bool:
    """Whether `save_fitted` wrote into a folder."""
    return (folder / STATE_FILE).is_file()


def load_fitted(folder: Path, *, offload: bool = False) -> tuple[Fitted, list[Path]]:
    """Read what `save_fitted` wrote: the fitted state and the snapshots.

    Args:
        folder: that it wrote into.
        offload: whether the factors stay in main memory; see `LaplacePosterior`.

    Raises:
        ValueError: if a file is damaged, of another version, or the two do not belong together.
        FileNotFoundError: if the posterior or a snapshot is missing.
    """
    path = folder / STATE_FILE
    content = _read(path)
    try:
        state = FittedState.from_mapping(content["fitted"])
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); fit again") from error
    posterior = None
    if content["posterior"] is not None:
        posterior = LaplacePosterior.load(folder / POSTERIOR_FILE, offload=offload)
        if posterior.factors.fingerprint != content["posterior"]:
            raise ValueError(f"{path} and {POSTERIOR_FILE} beside it come from different fits; fit again")
    snapshots = [folder / name for name in content["snapshots"]]
    missing = [str(snapshot) for snapshot in snapshots if not snapshot.is_file()]
    if missing:
        raise FileNotFoundError(f"{path} names snapshots that are gone: {missing}")
    return Fitted(state, posterior, content["fingerprint"], content["settings"]), snapshots


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no JSON ({error}); fit again") from error
    expected = {"version", "fingerprint", "settings", "posterior", "fitted", "snapshots"}
    if not isinstance(content, dict) or set(content) != expected or content["version"] != _VERSION:
        raise ValueError(f"{path} is not of version {_VERSION} of bmoe_lightning's format; fit again")
    kinds: dict[str, type | tuple[type, ...]] = {
        "fingerprint": str,
        "settings": dict,
        "posterior": (str, type(None)),
        "fitted": dict,
        "snapshots": list,
    }
    wrong = [name for name, kind in kinds.items() if not isinstance(content[name], kind)]
    if wrong or not all(isinstance(name, str) for name in content["snapshots"]):
        raise ValueError(f"{path} is damaged (another kind of {', '.join(wrong) or 'snapshots'}); fit again")
    return content
