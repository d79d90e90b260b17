"""The running sums of one layer's Kronecker factors, and how the slots of a batch enter them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bmoe_lightning.curvature.factors import LayerFactors
from bmoe_lightning.curvature.sketch import SketchName, check_state, check_sums, make_sketch
from bmoe_lightning.experts.grouped_matmul import ExpertGroups
from bmoe_lightning.experts.layouts.registry import PLAIN_LINEAR
from bmoe_lightning.experts.taps import Slots
from bmoe_lightning.experts.types import ExpertLayer
from bmoe_lightning.utils import devices

# Share of the largest gradient of a row. Measured on the queries of a language model with 30 layers: rounding errors of
# first tokens are at most 2.4e-6 in float32 and 9e-7 in bfloat16, and gradients of second tokens, which are the first
# that count where attention is not fused, at least 7.8e-5. Those of later tokens are as small as 1.5e-6 in rows of some
# 270 tokens, where this share of all tokens would leave out .4 % of them.
_ROUNDING = 2.0**-16


class LayerBatch:
    """Adds the slots of one batch and layer to the running sums: first all gradients, then the inputs.

    A slot counts when its weight gradient is not exactly zero. Of the first token in a row that affects a logit, in a
    plain linear layer, it must be more than a rounding error besides: that token attends to itself alone, so its query
    has a gradient of zero, which fused attention computes as a difference of two rounded sums. Rows are compared with
    themselves alone, since one example may be far surer than another; later tokens count however small their gradient.

    Args:
        sums: The layer's sums.
        slots: The S slots of the batch.
        owners: Example of each slot `[S]` int64, -1 for none, for the reduce form; None for the expand form.
        num_examples: Number of examples B.
        num_rows: Number of rows of the model's input, that `slots.rows` counts.
    """

    def __init__(
        self, sums: LayerSums, slots: Slots, owners: Tensor | None, num_examples: int, num_rows: int = 0
    ) -> None:
        self._sums = sums
        self._slots = slots
        self._rows = slots.rows if sums.layer.layout == PLAIN_LINEAR.name else None
        self._num_rows = num_rows
        self._merge = None if owners is None else _Merge(slots.experts, owners, sums.layer.num_experts, num_examples)
        self._live = _not_zero(slots.inputs)
        self._counted = torch.zeros_like(self._live)
        self._complete: Tensor | None = None  # slots whose gradient has not underflowed in float16

    def add_gradients(self, gradients: Tensor, smallest: float) -> None:
        """Add the gradients of one backward pass.

        Args:
            gradients: Gradients `[S, d_out]` at the output of `down_proj`.
            smallest: The smallest gradient that float16 represents with full precision; 0 if it takes no part.
        """
        peaks = _peaks(gradients)
        moves = (peaks != 0) & self._live
        if self._rows is not None:
            sizes = peaks.float()  # the threshold may be below the range of float16
            largest = sizes.new_zeros(self._num_rows).scatter_reduce(0, self._rows, sizes, "amax")
            is_rounding = sizes < _ROUNDING * largest[self._rows]
            moves &= ~(is_rounding & first_tokens(moves, self._rows, self._num_rows))
        self._counted |= moves
        if smallest:
            # Zeros beside values that float16 represents with fewer digits were too small for it.
            complete = (peaks >= smallest) | gradients.all(dim=1)
            self._complete = complete if self._complete is None else self._complete | complete
        experts = self._slots.experts
        if self._merge is not None:
            gradients, experts = self._merge.sum(gradients * moves.unsqueeze(1)), self._merge.experts
            moves = _not_zero(gradients)
        self._sums.add_gradients(gradients, experts, moves)

    def add_inputs(self) -> None:
        """Add the inputs of all slots with a gradient, and count them."""
        inputs, experts, counted = self._slots.inputs, self._slots.experts, self._counted
        if self._complete is not None:
            self._sums.underflowed = self._sums.underflowed + (counted & ~self._complete).sum()
        if self._merge is not None:
            inputs, counted = self._merge.mean(inputs, counted)
            experts = self._merge.experts
        self._sums.slots.index_add_(0, experts, counted.double())
        self._sums.add_inputs(inputs, experts, counted)


def first_tokens(moves: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """Which slots `[S]` are the first of their row that affects a logit.

    Args:
        moves: Whether a slot affects a logit, `[S]`, in the order of the tokens.
        rows: Row of each slot, `[S]` int64.
        num_rows: Number of rows.
    """
    order = torch.arange(len(moves), device=moves.device)
    first = order.new_full((num_rows,), len(moves))
    first = first.scatter_reduce(0, rows, order.masked_fill(~moves, len(moves)), "amin")
    return order == first[rows]


def _peaks(slots: Tensor) -> Tensor:
    """The largest absolute value of each row of `[S, d]`, `[S]`; NaN if it has one."""
    return slots.abs().amax(dim=1)


def _not_zero(slots: Tensor) -> Tensor:
    """Which rows of `[S, d]` have a value other than zero, `[S]`; NaN is one. Faster than `any` on the CPU."""
    return _peaks(slots) != 0


def _grouped(
    values: Tensor, experts: Tensor, keep: Tensor, num_experts: int, dtype: torch.dtype
) -> tuple[Tensor, ExpertGroups]:
    """The selected slots, sorted by expert, in a dtype.

    On an accelerator all slots, with the others set to zero, which does not change a sum: a selection would synchronise
    with it.
    """
    if devices.answers_at_once(values.device):
        chosen = keep.nonzero().squeeze(1)
        groups = ExpertGroups(experts[chosen], num_experts)
        return values[chosen[groups.order]].to(dtype), groups
    groups = ExpertGroups(experts, num_experts)
    return (values[groups.order] * keep[groups.order].unsqueeze(1)).to(dtype), groups


class LayerSums:
    """The running sums of one layer.

    Args:
        layer: The layer.
        like: A tensor with the device and dtype of its activations; sums are in at least float32.
        rank: Number of eigenpairs of each factor.
        sketch: Low-rank algorithm; see `make_sketch`.
        seed: Seed of random test matrices.

    Attributes:
        slots: Number of counted slots, `[E]` float64.
        underflowed: Number of counted slots whose gradient underflowed in part in float16, int64.
    """

    def __init__(self, layer: ExpertLayer, like: Tensor, rank: int, sketch: SketchName, seed: int) -> None:
        self.layer = layer
        self.dtype = torch.promote_types(like.dtype, torch.float32)
        # A separate random stream per layer, so that results do not depend on which other layers are tapped.
        generator = torch.Generator().manual_seed(seed * 1_000_003 + layer.index)
        options = {"device": like.device, "dtype": self.dtype, "generator": generator}
        self.inputs = make_sketch(sketch, layer.num_experts, layer.d_in, rank, **options)  # type: ignore[arg-type]
        self.gradients = make_sketch(sketch, layer.num_experts, layer.d_out, rank, **options)  # type: ignore[arg-type]
        self.slots = torch.zeros(layer.num_experts, device=like.device, dtype=torch.float64)
        self.underflowed = torch.zeros((), device=like.device, dtype=torch.int64)

    def add_gradients(self, gradients: Tensor, experts: Tensor, keep: Tensor) -> None:
        """Add gradients `[S, d_out]` of the experts `[S]` where `keep` `[S]` says so."""
        self.gradients.update(*_grouped(gradients, experts, keep, self.layer.num_experts, self.dtype))

    def add_inputs(self, inputs: Tensor, experts: Tensor, keep: Tensor) -> None:
        """Add inputs `[S, d_in]` of the experts `[S]` where `keep` `[S]` says so."""
        self.inputs.update(*_grouped(inputs, experts, keep, self.layer.num_experts, self.dtype))

    def tensors(self) -> list[Tensor]:
        """All sums of this layer."""
        return [self.slots, *self.inputs.sums(), *self.gradients.sums()]

    def state(self) -> dict[str, Tensor]:
        """All tensors needed to resume, by name."""
        parts = {"inputs": self.inputs.state(), "gradients": self.gradients.state()}
        named = {f"{part}.{name}": tensor for part, state in parts.items() for name, tensor in state.items()}
        return {"slots": self.slots, **named}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore a `state`; raises `ValueError` if it does not fit."""
        check_state(self.state(), state)
        check_sums({"slots": state["slots"]})
        self.slots.copy_(state["slots"])
        for part, sketch in (("inputs.", self.inputs), ("gradients.", self.gradients)):
            sketch.load_state({n.removeprefix(part): tensor for n, tensor in state.items() if n.startswith(part)})

    def finish(self, scale: float) -> LayerFactors:
        """The factors, with the number of slots multiplied by a scale.

        Raises:
            ValueError: If a factor is not finite; the message names layer and expert.
        """
        for kind, trace in (("a", self.inputs.trace), ("g", self.gradients.trace)):
            broken = (~trace.isfinite()).nonzero().flatten().tolist()
            if broken:
                raise ValueError(
                    f"the {kind}-factor of layer {self.layer.name!r} is not finite for expert {broken[0]}"
                    + (f" and {len(broken) - 1} more" if len(broken) > 1 else "")
                    + ": the model's activations or gradients overflow; try bfloat16 or float32 weights"
                )
        a, g = self.inputs.finish(), self.gradients.finish()
        mean = 1 / self.slots.clamp(min=1)
        column = mean.to(self.dtype).unsqueeze(1)
        return LayerFactors(
            self.layer.name,
            self.layer.index,
            slots=self.slots * scale,
            a_basis=a.basis,
            a_eigenvalues=a.eigenvalues * column,
            g_basis=g.basis,
            g_eigenvalues=g.eigenvalues * column,
            a_trace=self.inputs.trace * mean,
            g_trace=self.gradients.trace * mean,
        )


class _Merge:
    """Merges the slots of each example and expert, for the reduce form: E B groups, many of them empty."""

    def __init__(self, experts: Tensor, owners: Tensor, num_experts: int, num_examples: int) -> None:
        # Slots without an owner affect no logit, so they add nothing to the group they are assigned to.
        self._group = owners.clamp(min=0) * num_experts + experts
        self._count = num_experts * num_examples
        self.experts = torch.arange(self._count, device=experts.device) % num_experts

    def sum(self, values: Tensor) -> Tensor:
        """Sum `[S, d]` over each group: `[E B, d]`, in at least float32."""
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        return values.new_zeros(self._count, values.shape[1]).index_add_(0, self._group, values)

    def mean(self, values: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Average the counted rows of `[S, d]` over each group: `[E B, d]`, and whether a group has any `[E B]`."""
        totals = self.sum(values * counts.unsqueeze(1))
        sizes = self.sum(counts.unsqueeze(1))
        return totals / sizes.clamp(min=1), sizes.squeeze(1) > 0
