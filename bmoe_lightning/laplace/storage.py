"""A posterior on disk: one safetensors file, with its description as JSON in the header.

There is no pickle, so loading a file runs no code from it, and all contents are checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bmoe_lightning.curvature.factors import BASIS_DTYPES, KroneckerFactors, LayerFactors
from bmoe_lightning.experts.layouts.registry import LAYOUTS
from bmoe_lightning.experts.types import ExpertLayer
from bmoe_lightning.experts.weight_record import WeightRecord
from bmoe_lightning.utils.safetensors_io import SealedTensors, TensorFile, read_tensor_file, seal_tensors, write_sealed

FORMAT = "posterior"
VERSION = 1
_FIELDS = (
    "slots", "a_basis", "a_eigenvalues", "g_basis", "g_eigenvalues", "a_trace", "g_trace",
)  # fmt: skip
_FACTORS = (
    "rank", "fisher", "approximation", "sketch", "num_examples", "num_examples_used", "fingerprint",
)  # fmt: skip
# Tolerance on the Gram matrix of the columns against the identity: rounding of the decomposition and of the dtype.
# Bases in half precision are re-orthonormalised before use.
_BASIS_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# Relative tolerance by which the sum of the eigenvalues may exceed the trace: both are sums over all tokens.
_TRACE_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2}


@dataclass(frozen=True)
class StoredPosterior:
    """A posterior loaded from a file.

    Attributes:
        factors: Curvature.
        prior_precision: Prior precision of each layer, `[L]`.
        prior_mean: Kind of prior mean.
        description: Description passed to `save_posterior`, as JSON values.
        fit: Id of the fit that the file belongs to; empty for none.
        digest: SHA-256 digest of the content.
    """

    factors: KroneckerFactors
    prior_precision: Tensor
    prior_mean: str
    description: dict[str, Any]
    fit: str
    digest: str


def sealed_posterior(
    factors: KroneckerFactors,
    prior_precision: Tensor,
    prior_mean: str,
    *,
    description: Mapping[str, Any] | None = None,
    fit: str = "",
) -> SealedTensors:
    """The content of a posterior's file; arguments are those of `save_posterior`."""
    tensors = {
        f"{position}.{name}": value
        for position, layer in enumerate(factors.layers)
        for name, value in layer.tensors().items()
    }
    content = {
        **{name: getattr(factors, name) for name in _FACTORS},
        "expert_layers": [asdict(layer) for layer in factors.expert_layers],
        "prior_mean": prior_mean,
        "layers": [{"name": layer.name, "index": layer.index} for layer in factors.layers],
        "description": dict(description or {}),
    }
    tensors["prior_precision"] = prior_precision
    if factors.weights is not None:
        tensors |= {f"weights.{name}": value for name, value in factors.weights.tensors().items()}
    return seal_tensors(tensors, format=FORMAT, version=VERSION, description=content, fit=fit)


def save_posterior(
    path: str | Path,
    factors: KroneckerFactors,
    prior_precision: Tensor,
    prior_mean: str,
    *,
    description: Mapping[str, Any] | None = None,
    fit: str = "",
) -> str:
    """Write a posterior atomically.

    Args:
        path: Target path; its folder is created if missing.
        factors: Curvature.
        prior_precision: Prior precision of each layer, `[L]`.
        prior_mean: Kind of prior mean.
        description: Specification of the curvature, or any other metadata, as JSON values.
        fit: Id of the fit that the file belongs to.

    Returns:
        The SHA-256 digest of the content.

    Raises:
        OSError: If the file cannot be written; an existing file is unchanged.
    """
    sealed = sealed_posterior(factors, prior_precision, prior_mean, description=description, fit=fit)
    write_sealed(path, sealed)
    return sealed.digest


def load_posterior(path: str | Path) -> StoredPosterior:
    """Load a file that `save_posterior` wrote; unknown keys and tensors are ignored.

    Raises:
        FileNotFoundError: If the file does not exist.
        OSError: If it cannot be read, such as a `PermissionError`.
        ValueError: If it is not a posterior, is truncated or damaged, has another version, or contains invalid values.
    """
    path = Path(path)
    file = read_tensor_file(path, format=FORMAT, version=VERSION, remedy="save the posterior again")
    content = file.description
    try:
        layers = tuple(_layer(position, layer, file) for position, layer in enumerate(content["layers"]))
        expert_layers = tuple(described_layer(layer) for layer in content["expert_layers"])
        weights = WeightRecord.from_tensors(
            {
                name.removeprefix("weights."): value
                for name, value in file.tensors.items()
                if name.startswith("weights.")
            }
        )
        known = {name: content[name] for name in _FACTORS}
        factors = KroneckerFactors(layers, expert_layers=expert_layers, weights=weights, **known)
        prior_mean, description = content["prior_mean"], dict(content.get("description", {}))
        precision = _prior_precision(file, len(layers))
        _check_factors(factors, prior_mean)
    except (AttributeError, KeyError, TypeError) as error:
        raise _refusal(path, f"its header does not describe its layers ({error!r})") from error
    except ValueError as error:
        raise _refusal(path, str(error)) from error
    return StoredPosterior(factors, precision, prior_mean, description, file.fit, file.digest)


def _refusal(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path} contains no valid posterior: {reason}. Fit it again, and save it with this release.")


def described_layer(described: Mapping[str, Any]) -> ExpertLayer:
    """The expert layer of a description in a file; unknown fields are ignored.

    Raises:
        ValueError: If a field has an invalid value, or this release does not know the layout.
        TypeError: If a field is missing.
    """
    known = {field.name for field in fields(ExpertLayer)}
    layer = ExpertLayer(**{name: value for name, value in described.items() if name in known})
    texts = (layer.name, layer.layout, layer.down_proj)
    sizes = (layer.index + 1 if type(layer.index) is int else 0, layer.num_experts, layer.d_in, layer.d_out)
    valid = all(isinstance(text, str) for text in texts) and isinstance(layer.transposed, bool)
    if not valid or not all(type(size) is int and size > 0 for size in sizes):
        raise ValueError(f"an expert layer is described by invalid values: {layer}")
    if layer.layout not in LAYOUTS:
        raise ValueError(f"this release does not know the layout {layer.layout!r} of expert layer {layer.name!r}")
    return layer


def _check_factors(factors: KroneckerFactors, prior_mean: Any) -> None:
    """Check the fields of a header against each other."""
    texts = (factors.fisher, factors.approximation, factors.sketch, factors.fingerprint, prior_mean)
    counts = (factors.rank, factors.num_examples, factors.num_examples_used)
    if not all(isinstance(text, str) for text in texts) or not all(
        type(count) is int and count >= 0 for count in counts
    ):
        raise ValueError(f"its header has invalid values: {texts}, {counts}")
    described = {layer.name: layer for layer in factors.expert_layers}
    if len({layer.name for layer in factors.layers}) < len(factors.layers):
        raise ValueError("it has a layer twice")
    for layer in factors.layers:
        known = described.get(layer.name)
        sizes = (layer.index, layer.num_experts, layer.d_in, layer.d_out)
        if known is None or sizes != (known.index, known.num_experts, known.d_in, known.d_out):
            raise ValueError(f"layer {layer.name!r} has index and sizes {sizes}, which are not described")
        if max(layer.a_basis.shape[2], layer.g_basis.shape[2]) > factors.rank:
            raise ValueError(f"layer {layer.name!r} has more eigenvalues than its rank {factors.rank}")


def _prior_precision(file: TensorFile, num_layers: int) -> Tensor:
    precision = file.tensors.get("prior_precision")
    if precision is None or precision.shape != (num_layers,):
        raise ValueError(f"there is no prior precision for its {num_layers} layers")
    if precision.dtype != torch.float64 or not bool((precision.isfinite() & (precision > 0)).all()):
        raise ValueError(f"prior precisions must be positive and finite, got {precision.tolist()}")
    return precision


def _layer(position: int, described: Mapping[str, Any], file: TensorFile) -> LayerFactors:
    name = described["name"]
    missing = [field for field in _FIELDS if f"{position}.{field}" not in file.tensors]
    if missing:
        raise ValueError(f"it lacks {missing} of layer {name!r}")
    layer = LayerFactors(name, described["index"], **{field: file.tensors[f"{position}.{field}"] for field in _FIELDS})
    reason = _shape_fault(layer) or _value_fault(layer) or _factor_fault(layer, "a") or _factor_fault(layer, "g")
    if reason:
        raise ValueError(f"{reason} in layer {name!r}")
    return layer


def _shape_fault(layer: LayerFactors) -> str:
    num_experts = layer.slots.numel()
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("slots", "a_trace", "g_trace"), (num_experts,))
    for side in "ag":
        basis: Tensor = getattr(layer, f"{side}_basis")
        d, rank = basis.shape[-2:] if basis.dim() == 3 else (0, 0)
        shapes |= {f"{side}_basis": (num_experts, d, rank), f"{side}_eigenvalues": (num_experts, rank)}
    for field, shape in shapes.items():
        found = tuple(getattr(layer, field).shape)
        if found != shape:
            return f"{field} has shape {found} instead of {shape}"
    return ""


def _value_fault(layer: LayerFactors) -> str:
    for field, tensor in layer.tensors().items():
        if tensor.dtype not in (BASIS_DTYPES if field.endswith("basis") else _TRACE_TOLERANCE):
            return f"{field} has the unexpected dtype {tensor.dtype}"
        if field in ("slots", "a_trace", "g_trace") and tensor.dtype != torch.float64:
            return f"{field} has the unexpected dtype {tensor.dtype}"
        if not bool(torch.isfinite(tensor).all()):
            return f"{field} has non-finite values"
        if not field.endswith("basis") and bool((tensor < 0).any()):
            return f"{field} has negative values"
    return ""


def _factor_fault(layer: LayerFactors, side: str) -> str:
    """Why basis, eigenvalues and trace are not those of one positive semi-definite matrix; empty if they are."""
    basis, values = getattr(layer, f"{side}_basis"), getattr(layer, f"{side}_eigenvalues")
    wide = basis.to(torch.promote_types(basis.dtype, torch.float32))
    error = (wide.mT @ wide - torch.eye(basis.shape[2], dtype=wide.dtype)).abs()
    if error.numel() and float(error.max()) > _BASIS_TOLERANCE[basis.dtype]:
        return f"the columns of {side}_basis are not orthonormal"
    if bool((values.diff(dim=1) > 0).any()):
        return f"{side}_eigenvalues are not in descending order"
    if bool((values.double().sum(1) > getattr(layer, f"{side}_trace") * (1 + _TRACE_TOLERANCE[values.dtype])).any()):
        return f"{side}_eigenvalues sum to more than {side}_trace"
    return ""
