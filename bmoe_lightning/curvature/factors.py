"""Low-rank Kronecker factors of every expert: the result of a curvature pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bmoe_lightning.experts.types import ExpertLayer
from bmoe_lightning.experts.weight_record import WeightRecord
from bmoe_lightning.utils.messages import numbered

BASIS_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def orthonormal(basis: Tensor, dtype: torch.dtype) -> Tensor:
    """A basis in a wider dtype, with its columns re-orthonormalised if it was stored in half precision.

    Otherwise rounding could make the explained variance exceed the prior variance.

    Args:
        basis: Basis `[E, d, r]`.
        dtype: Target dtype, float32 or float64.
    """
    wide = basis.to(dtype)
    if basis.dtype not in (torch.bfloat16, torch.float16):
        return wide
    # R of the QR decomposition, from a Cholesky factor of the Gram matrix of the columns.
    root, _ = torch.linalg.cholesky_ex((wide.mT @ wide).double())
    return torch.linalg.solve_triangular(root.mT.to(dtype), wide, upper=True, left=False)


@dataclass(frozen=True)
class LayerFactors:
    """Factors of one expert layer: `F_e ~ n_e (U_a diag(alpha) U_a^T) kron (U_g diag(gamma) U_g^T)`.

    Attributes:
        name: Name of the expert layer.
        index: Index among the model's expert layers.
        slots: Number of counted slots n_e, `[E]` float64, rescaled where only a subset of the data was used.
        a_basis: Basis `[E, d_in, r_a]` of the activation factor, with orthonormal columns.
        a_eigenvalues: Eigenvalues `[E, r_a]` of the mean of `a a^T`, descending.
        g_basis: Basis `[E, d_out, r_g]` of the gradient factor, with orthonormal columns.
        g_eigenvalues: Eigenvalues `[E, r_g]` of the mean of `E_y[delta delta^T]`, descending.
        a_trace: Trace of the full a-factor, `[E]` float64.
        g_trace: Trace of the full g-factor, `[E]` float64.
    """

    name: str
    index: int
    slots: Tensor
    a_basis: Tensor
    a_eigenvalues: Tensor
    g_basis: Tensor
    g_eigenvalues: Tensor
    a_trace: Tensor
    g_trace: Tensor

    @property
    def num_experts(self) -> int:
        """Number of experts E."""
        return len(self.slots)

    @property
    def d_in(self) -> int:
        """Width of the second linear layer's input."""
        return self.a_basis.shape[1]

    @property
    def d_out(self) -> int:
        """Width of the second linear layer's output."""
        return self.g_basis.shape[1]

    def curvature(self) -> Tensor:
        """Eigenvalues of the Kronecker product, `[E, r_g, r_a]` float64: `s_qp = n_e gamma_q alpha_p`."""
        products = self.g_eigenvalues.double().unsqueeze(2) * self.a_eigenvalues.double().unsqueeze(1)
        return products * self.slots.to(products).view(-1, 1, 1)

    def discarded_energy(self) -> Tensor:
        """Fraction of the Kronecker product's trace outside the low-rank bases, `[E]`; 0 for experts without slots."""
        full = (self.a_trace * self.g_trace).cpu()
        kept = (self.a_eigenvalues.double().sum(1) * self.g_eigenvalues.double().sum(1)).cpu()
        return torch.where(full > 0, (1 - kept / full.clamp(min=torch.finfo(full.dtype).tiny)).clamp(0, 1), 0.0)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by field name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def equals(self, other: LayerFactors) -> bool:
        """Whether all values are the same, bit for bit."""
        here, there = self.tensors(), other.tensors()
        return (self.name, self.index) == (other.name, other.index) and all(
            values.dtype == there[name].dtype and torch.equal(values, there[name]) for name, values in here.items()
        )

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> LayerFactors:
        """The same factors on another device, or with bases of another dtype; see `KroneckerFactors.to`."""
        moved: dict[str, Any] = {name: value.to(device) for name, value in self.tensors().items()}
        if dtype is not None:
            moved |= {name: moved[name].to(dtype) for name in ("a_basis", "g_basis")}
        return replace(self, **moved)


def share_equal_layers(curvatures: Sequence[KroneckerFactors]) -> list[KroneckerFactors]:
    """The same curvatures, with equal factors of one layer as one object, as after `KroneckerFactors.without`.

    Args:
        curvatures: Curvatures of one model, read from different files.
    """
    known: dict[str, list[LayerFactors]] = {}

    def shared(layer: LayerFactors) -> LayerFactors:
        candidates = known.setdefault(layer.name, [])
        for candidate in candidates:
            if candidate.equals(layer):
                return candidate
        candidates.append(layer)
        return layer

    return [replace(curvature, layers=tuple(map(shared, curvature.layers))) for curvature in curvatures]


@dataclass(frozen=True)
class KroneckerFactors:
    """The curvature of all tapped expert layers.

    Attributes:
        layers: Factors of each expert layer.
        rank: Requested rank.
        fisher: Labels of the Fisher: `exact`, `mc` or `empirical`.
        approximation: K-FAC form, `expand` or `reduce`.
        sketch: Requested low-rank algorithm.
        num_examples: Number of examples that the factors are scaled to.
        num_examples_used: Number of examples in the curvature pass.
        expert_layers: Descriptions of all tapped layers, with which a model's layers are located; more than `layers`
            where some were skipped.
        fingerprint: Fingerprint of the model's MoE blocks during the pass (see `weight_fingerprint`).
        weights: Record of the model's effective weights, with which renamed, merged or cast ones are recognised.
    """

    layers: tuple[LayerFactors, ...]
    rank: int
    fisher: str
    approximation: str
    sketch: str
    num_examples: int
    num_examples_used: int
    expert_layers: tuple[ExpertLayer, ...]
    fingerprint: str = field(default="")
    weights: WeightRecord | None = field(default=None, repr=False)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the layers."""
        return tuple(layer.name for layer in self.layers)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> KroneckerFactors:
        """The same factors on another device, or with bases of another dtype.

        Args:
            device: Target device; None moves nothing.
            dtype: Dtype of the two bases, which take nearly all of the memory; None leaves it. Eigenvalues, traces and
                counts are not cast. Computations use the bases in at least float32, re-orthonormalised (see
                `orthonormal`).

        Raises:
            ValueError: If the dtype is not float64, float32, bfloat16 or float16.
        """
        if dtype is not None and dtype not in BASIS_DTYPES:
            raise ValueError(f"bases must be stored in one of {', '.join(map(str, BASIS_DTYPES))}, not in {dtype}")
        return KroneckerFactors(tuple(layer.to(device, dtype) for layer in self.layers), **self.description())

    def without(self, indices: Sequence[int]) -> KroneckerFactors:
        """The factors without some layers, whose weights are then deterministic.

        Args:
            indices: Indices of the layers to skip.

        Raises:
            ValueError: If an index does not exist, or no layer is left.
        """
        unknown = set(indices) - {layer.index for layer in self.layers}
        if unknown:
            raise ValueError(
                f"no expert layer has the index {sorted(unknown)}; use those of the layers "
                f"({numbered({layer.index: layer.name for layer in self.layers})})"
            )
        kept = tuple(layer for layer in self.layers if layer.index not in set(indices))
        if not kept:
            raise ValueError("skipping every expert layer leaves no posterior; skip fewer")
        return KroneckerFactors(kept, **self.description())

    def description(self) -> dict[str, Any]:
        """All fields except the layers."""
        return {name: value for name, value in vars(self).items() if name != "layers"}
