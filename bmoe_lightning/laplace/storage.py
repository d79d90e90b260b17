"""A posterior on disk: one safetensors file, its description as JSON in the header.

No pickle: nothing in the file is executed when it is read, and everything is checked before it is used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from bmoe_lightning.curvature.factors import KroneckerFactors, LayerFactors
from bmoe_lightning.experts.types import ExpertLayer, LayoutName
from bmoe_lightning.utils.safetensors_io import read_safetensors, write_safetensors

FORMAT = "bmoe_lightning.posterior"
VERSION = 1
_FIELDS = (
    "slots", "a_basis", "a_eigenvalues", "g_basis", "g_eigenvalues", "a_trace", "g_trace",
)  # fmt: skip


def save_posterior(path: str | Path, factors: KroneckerFactors, prior_precision: Tensor, prior_mean: str) -> None:
    """Write a posterior; see `LaplacePosterior.save`."""
    tensors = {
        f"{position}.{name}": value
        for position, layer in enumerate(factors.layers)
        for name, value in layer.tensors().items()
    }
    header = {
        "format": FORMAT,
        "version": VERSION,
        **factors.description(),
        "expert_layers": [asdict(layer) for layer in factors.expert_layers],
        "prior_mean": prior_mean,
        "layers": [{"name": layer.name, "index": layer.index} for layer in factors.layers],
    }
    write_safetensors(path, {**tensors, "prior_precision": prior_precision}, {FORMAT: json.dumps(header)})


def load_posterior(path: str | Path) -> tuple[KroneckerFactors, Tensor, str]:
    """Read factors, prior precision `[L]` and the kind of prior mean; see `LaplacePosterior.load`."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no posterior at {path}")
    tensors, metadata = read_safetensors(path)
    header = _header(path, metadata)
    try:
        layers = tuple(_layer(path, position, layer, tensors) for position, layer in enumerate(header.pop("layers")))
        header["expert_layers"] = tuple(ExpertLayer(**layer) for layer in header["expert_layers"])
        unknown = {layer.layout for layer in header["expert_layers"]} - set(get_args(LayoutName))
        if unknown:
            raise ValueError(f"{path} has expert layers of a layout {sorted(unknown)} that this release does not know")
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} has a header that does not describe its layers: {error!r}") from error
    precision = tensors.get("prior_precision")
    if precision is None or precision.shape != (len(layers),):
        raise ValueError(f"{path} has no prior precision for its {len(layers)} layers")
    prior_mean = header.pop("prior_mean")
    return KroneckerFactors(layers, **header), precision, prior_mean


def _header(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    if FORMAT not in metadata:
        raise ValueError(f"{path} is a safetensors file, but no posterior of bmoe_lightning")
    try:
        header = json.loads(metadata[FORMAT])
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} has a header that is no JSON ({error})") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path} has a header that is no JSON object")
    version = header.pop("version", None)
    header.pop("format", None)
    if version != VERSION:
        raise ValueError(f"{path} has version {version} of the posterior format; this release reads version {VERSION}")
    required = {
        "rank",
        "fisher",
        "approximation",
        "sketch",
        "num_examples",
        "num_examples_used",
        "expert_layers",
        "fingerprint",
    }
    if set(header) != required | {"prior_mean", "layers"}:
        raise ValueError(f"{path} has an incomplete header: {sorted(header)}")
    return header


def _layer(path: Path, position: int, described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> LayerFactors:
    missing = [name for name in _FIELDS if f"{position}.{name}" not in tensors]
    if missing:
        raise ValueError(f"{path} lacks {missing} of layer {described.get('name')!r}")
    found = {name: tensors[f"{position}.{name}"] for name in _FIELDS}
    num_experts = found["slots"].numel()
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("slots", "a_trace", "g_trace"), (num_experts,))
    for side in "ag":
        d, rank = found[f"{side}_basis"].shape[-2:] if found[f"{side}_basis"].dim() == 3 else (0, 0)
        shapes |= {f"{side}_basis": (num_experts, d, rank), f"{side}_eigenvalues": (num_experts, rank)}
    for name, shape in shapes.items():
        if tuple(found[name].shape) != shape:
            raise ValueError(
                f"{path}: {name} of layer {described['name']!r} has shape {tuple(found[name].shape)}, not {shape}"
            )
    if not all(bool(torch.isfinite(tensor).all()) for tensor in found.values()):
        raise ValueError(f"{path}: layer {described['name']!r} holds values that are not finite")
    return LayerFactors(described["name"], described["index"], **found)
