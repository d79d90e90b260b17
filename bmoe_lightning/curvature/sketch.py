"""Streaming low-rank factors of second moments, for all experts of a layer at once.

Each accumulator takes slots `x [S, d]` batch by batch and returns the leading eigenpairs of `sum_s x_s x_s^T` for every
expert: an orthonormal basis `[E, d, r]` and eigenvalues `[E, r]`, descending. The trace is accumulated too, so that the
energy outside the basis is known. There is no loop over experts, and no `d x d` matrix except in `ExactGram`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bmoe_lightning.experts.grouped_matmul import ExpertGroups

SketchName = Literal["auto", "nystrom", "rsvd", "exact"]

# Below this width the exact sum costs less than any sketch of it.
EXACT_WIDTH = 512
_OVERSAMPLING = 10
_NOT_LINEAR = (
    "sketch='rsvd' truncates after every batch, so the results of several ranks cannot be summed; use sketch='auto', "
    "'nystrom' or 'exact', or one process"
)


@dataclass(frozen=True)
class LowRank:
    """Leading eigenpairs of a positive semi-definite matrix per expert.

    Attributes:
        basis: Basis `[E, d, r]` with orthonormal columns.
        eigenvalues: Eigenvalues `[E, r]`, non-negative, descending.
    """

    basis: Tensor
    eigenvalues: Tensor


class GramSketch(ABC):
    """Accumulates `sum_s x_s x_s^T` for every expert.

    Args:
        num_experts: Number of experts E.
        width: Width d of a slot.
        rank: Number of eigenpairs r; at most `width` are returned.
        device: Device of the state.
        dtype: Dtype of the state, float32 or float64.
        generator: CPU generator of the random test matrices, so that they are the same on every device.
    """

    def __init__(
        self,
        num_experts: int,
        width: int,
        rank: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
        generator: torch.Generator,
    ) -> None:
        self.rank = min(rank, width)
        self.trace = torch.zeros(num_experts, device=device, dtype=torch.float64)
        self._generator = generator
        self._empty = torch.empty(0, device=device, dtype=dtype)
        self._allocate(num_experts, width)

    def update(self, x: Tensor, groups: ExpertGroups) -> None:
        """Add slots `x [S, d]`, sorted by expert as `groups` says."""
        self.trace += groups.sum(torch.linalg.vector_norm(x, dim=1).double().square())
        self._update(x, groups)

    @abstractmethod
    def _allocate(self, num_experts: int, width: int) -> None: ...

    @abstractmethod
    def _update(self, x: Tensor, groups: ExpertGroups) -> None: ...

    @abstractmethod
    def sums(self) -> list[Tensor]:
        """The accumulated tensors, which can be summed (all-reduced) over accumulators of different data.

        Raises:
            ValueError: If the sketch is `rsvd`, which is not linear.
        """

    def state(self) -> dict[str, Tensor]:
        """All tensors needed to resume, by name: sums, test matrix and generator.

        They are not copies; the next `update` changes them.
        """
        return {"trace": self.trace, **self._accumulated(), "generator": self._generator.get_state()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore the `state` of an accumulator with the same arguments, from any device.

        Raises:
            ValueError: If tensors are missing, unexpected, of another shape or dtype, or have values that no sums have;
                the state is then unchanged.
        """
        own = self.state()
        check_state(own, state)
        check_sums(state)
        self._generator.set_state(state["generator"].cpu())
        for name in own.keys() - {"generator"}:
            own[name].copy_(state[name])

    @abstractmethod
    def _accumulated(self) -> dict[str, Tensor]: ...

    @abstractmethod
    def finish(self) -> LowRank:
        """The leading eigenpairs of the accumulated sums."""


class ExactGram(GramSketch):
    """The full `d x d` sum, for small d and as a reference."""

    def _allocate(self, num_experts: int, width: int) -> None:
        self._gram = self._empty.new_zeros(num_experts, width, width)

    def _update(self, x: Tensor, groups: ExpertGroups) -> None:
        groups.add_outer_sum_(self._gram, x, x)

    def _accumulated(self) -> dict[str, Tensor]:
        return {"gram": self._gram}

    def sums(self) -> list[Tensor]:
        """The full sums."""
        return [self.trace, self._gram]

    def finish(self) -> LowRank:
        """Eigendecomposition per expert, exact to rounding."""
        return _leading(self._gram, self.rank)


class NystromGram(GramSketch):
    """A linear sketch `Y_e = (sum_s x_s x_s^T) Omega` with one fixed test matrix.

    Being linear, it gives the same result for any split and order of the slots. The eigenpairs come from the fixed-rank
    Nystrom approximation of Tropp, Yurtsever, Udell and Cevher 2017, Fixed-Rank Approximation of a
    Positive-Semidefinite Matrix from Streaming Data, Algorithm 3 (https://arxiv.org/abs/1706.05736). The sketch has 4 r
    columns.
    """

    def _allocate(self, num_experts: int, width: int) -> None:
        columns = min(4 * self.rank, width)
        omega = torch.randn(width, columns, generator=self._generator, dtype=torch.float64)
        self._omega = torch.linalg.qr(omega).Q.to(self._empty)
        self._sketch = self._omega.new_zeros(num_experts, width, columns)

    def _update(self, x: Tensor, groups: ExpertGroups) -> None:
        groups.add_outer_sum_(self._sketch, x, x @ self._omega)

    def _accumulated(self) -> dict[str, Tensor]:
        # The test matrix too: another machine may round its QR differently.
        return {"sketch": self._sketch, "omega": self._omega}

    def sums(self) -> list[Tensor]:
        """The sketches; the test matrix is determined by the seed."""
        return [self.trace, self._sketch]

    def finish(self) -> LowRank:
        """Reconstruct in float64: the core matrix is too ill-conditioned for float32."""
        sketch, omega = self._sketch.double(), self._omega.double()
        norm = torch.linalg.matrix_norm(sketch, keepdim=True)
        # The shift lifts the core above the rounding of the accumulated sketch; it is arbitrary without slots.
        shift = torch.where(norm > 0, norm * torch.finfo(self._sketch.dtype).eps, 1)
        shifted = sketch + shift * omega
        core = omega.mT @ shifted
        values, vectors = torch.linalg.eigh((core + core.mT) / 2)
        half = shifted @ vectors / values.clamp(min=shift[..., 0] / 2).sqrt().unsqueeze(-2)
        left, singular, _ = torch.linalg.svd(half, full_matrices=False)
        eigenvalues = (singular.square() - shift[..., 0]).clamp(min=0) * (norm[..., 0] > 0)
        dtype = self._sketch.dtype
        return LowRank(left[..., : self.rank].to(dtype), eigenvalues[..., : self.rank].to(dtype))


class RandomizedGram(GramSketch):
    """Incremental randomised SVD for all experts at once: Algorithm 1 of the paper (https://arxiv.org/abs/2511.08968).

    Each batch updates the rank-r factor `U diag(s)` of the batches before to that of `B = [U diag(s), X^T]`. `B` is
    never formed: its range is sampled (Halko et al. 2011, https://arxiv.org/abs/0909.4061) with a Gaussian test matrix
    that has as many rows as `B` has columns (the printed algorithm gives it another shape), and the small problem is
    solved through `Q^T B B^T Q`. Each batch truncates, so the result depends on the order of the batches.
    """

    def _allocate(self, num_experts: int, width: int) -> None:
        self._columns = min(self.rank + _OVERSAMPLING, width)
        self._factor = self._empty.new_zeros(num_experts, width, self.rank)  # U diag(s)

    def _gaussian(self, rows: int) -> Tensor:
        drawn = torch.randn(rows, self._columns, generator=self._generator, dtype=torch.float64)
        return drawn.to(self._factor)

    def _update(self, x: Tensor, groups: ExpertGroups) -> None:
        sampled = self._factor @ self._gaussian(self.rank) + groups.outer_sum(x, self._gaussian(len(x)))
        frame = torch.linalg.qr(sampled).Q
        old, new = frame.mT @ self._factor, groups.matmul(x, frame)
        small = _leading(old @ old.mT + groups.outer_sum(new, new), self.rank)
        self._factor = frame @ small.basis * small.eigenvalues.sqrt().unsqueeze(-2)

    def _accumulated(self) -> dict[str, Tensor]:
        return {"factor": self._factor}

    def sums(self) -> list[Tensor]:
        """Not supported: the truncation of each batch depends on the batches before it."""
        raise ValueError(_NOT_LINEAR)

    def finish(self) -> LowRank:
        """Split the factor into basis and eigenvalues."""
        left, singular, _ = torch.linalg.svd(self._factor, full_matrices=False)
        return LowRank(left, singular.square())


_SKETCHES: dict[str, type[GramSketch]] = {"nystrom": NystromGram, "rsvd": RandomizedGram, "exact": ExactGram}
SKETCHES = ("auto", *_SKETCHES)


def make_sketch(
    name: SketchName,
    num_experts: int,
    width: int,
    rank: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> GramSketch:
    """Create an accumulator by name.

    Args:
        name: Low-rank algorithm: `nystrom`, `rsvd`, `exact`, or `auto`, which is `exact` up to a width of 512, where
            the full sum is cheaper, and `nystrom` above.
        num_experts: Number of experts E.
        width: Width d of a slot.
        rank: Number of eigenpairs r.
        device: Device of the state.
        dtype: Dtype of the state, float32 or float64.
        generator: CPU generator of the random test matrices.

    Raises:
        ValueError: If the name is unknown.
    """
    if name == "auto":
        name = "exact" if width <= EXACT_WIDTH else "nystrom"
    if name not in _SKETCHES:
        raise ValueError(f"unknown sketch {name!r}; valid are {', '.join(SKETCHES)}")
    return _SKETCHES[name](num_experts, width, rank, device=device, dtype=dtype, generator=generator)


def check_linear(name: str) -> None:
    """Check that a sketch is linear, so that the results of several ranks can be summed.

    Raises:
        ValueError: If it is not.
    """
    if name == "rsvd":
        raise ValueError(_NOT_LINEAR)


def check_state(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Check that a state has the tensors of an accumulator.

    Args:
        own: Current tensors of the accumulator by name.
        state: Tensors to load.

    Raises:
        ValueError: If a tensor is missing, unexpected, or has another shape or dtype.
    """
    if own.keys() != state.keys():
        raise ValueError(f"the state has the tensors {sorted(state)}, expected {sorted(own)}")
    for name, tensor in own.items():
        found = state[name]
        if (found.shape, found.dtype) != (tensor.shape, tensor.dtype):
            raise ValueError(
                f"{name!r} has shape {tuple(found.shape)} and dtype {found.dtype}, expected {tuple(tensor.shape)} and "
                f"{tensor.dtype}"
            )


def check_sums(state: Mapping[str, Tensor]) -> None:
    """Check that sums of squares are finite and not negative.

    Args:
        state: Tensors of an accumulator by name, of which only those that are there are checked.

    Raises:
        ValueError: If they are not; the message names the tensor.
    """
    for name, tensor in state.items():
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{name!r} has non-finite values")
    squares = {name: state[name] for name in ("trace", "slots") if name in state}
    if "gram" in state:
        squares["gram"] = state["gram"].diagonal(dim1=-2, dim2=-1)
    if "sketch" in state and "omega" in state:
        squares["sketch"] = (state["sketch"].double() * state["omega"].double()).sum((-2, -1))
    for name, values in squares.items():
        if bool((values < 0).any()):
            raise ValueError(f"{name!r} has negative values, and is a sum of squares")


def _leading(gram: Tensor, rank: int) -> LowRank:
    """The leading eigenpairs of symmetric matrices `[E, d, d]`, with negative eigenvalues clipped to zero."""
    values, vectors = torch.linalg.eigh(gram)
    return LowRank(vectors[..., -rank:].flip(-1), values[..., -rank:].flip(-1).clamp(min=0))
