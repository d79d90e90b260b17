"""Matrix products over slots that are grouped by expert, without a loop over experts.

Shapes: `S` slots, sorted by expert; `E` experts; the rows of expert e are `offsets[e - 1]:offsets[e]`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from bmoe_lightning.utils import devices

_BLOCK_ROWS = 32
_COPIED_FLOATS = 1 << 26
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class ExpertGroups:
    """The permutation that sorts slots by expert, and matrix products over the groups.

    Args:
        experts: Expert of each slot, `[S]` int64 in `0 .. num_experts - 1`, in any order.
        num_experts: Number of experts, those without a slot included.

    Attributes:
        order: Permutation `[S]` int64; `x[order]` is sorted by expert.
        experts: Expert of each sorted slot, `[S]` int64.
        counts: Number of slots of each expert, `[E]` int64.
    """

    def __init__(self, experts: Tensor, num_experts: int) -> None:
        self.experts, self.order = torch.sort(experts, stable=True)
        # scatter_add_ rather than bincount, which synchronises with the device to learn its output's length.
        self.counts = torch.zeros(num_experts, dtype=torch.int64, device=experts.device)
        self.counts.scatter_add_(0, self.experts, torch.ones_like(self.experts))
        self._offsets = self.counts.cumsum(0).to(torch.int32)

    def matmul(self, x: Tensor, weight: Tensor) -> Tensor:
        """Multiply every slot with the matrix of its expert.

        Args:
            x: Slots `[S, d]`, sorted by expert.
            weight: Matrices `[E, d, k]`.

        Returns:
            `[S, k]`, row s being `x[s] @ weight[experts[s]]`; differentiable in both arguments, but only once where
            torch's grouped kernel does not support the operands.
        """
        if _kernel_fits(x, weight):
            return F.grouped_mm(x, weight, offs=self._offsets)
        return _BlockedProduct.apply(self, x, weight)

    def _blocked_matmul(self, x: Tensor, weight: Tensor) -> Tensor:
        rows, block_experts, num_rows = self._blocks()
        blocks = x.new_zeros(num_rows, x.shape[1]).index_copy(0, rows, x).view(-1, _BLOCK_ROWS, x.shape[1])
        # Every block copies its expert's matrix, so their number at a time is limited.
        at_a_time = max(1, _COPIED_FLOATS // weight[0].numel())
        products = [
            torch.bmm(block, weight[experts])
            for block, experts in zip(blocks.split(at_a_time), block_experts.split(at_a_time), strict=True)
        ]
        return torch.cat(products).flatten(0, 1)[rows]

    def outer_sum(self, x: Tensor, z: Tensor) -> Tensor:
        """Sum the outer products of two slot vectors over the slots of each expert.

        Args:
            x: Slots `[S, d]`, sorted by expert.
            z: Slots `[S, k]`, sorted by expert.

        Returns:
            `[E, d, k]`, entry e being `x_e^T z_e`; zero for an expert without a slot.
        """
        if _kernel_fits(x, z):
            return F.grouped_mm(x.t(), z, offs=self._offsets)
        rows, block_experts, num_rows = self._blocks()
        left = x.new_zeros(num_rows, x.shape[1]).index_copy(0, rows, x).view(-1, _BLOCK_ROWS, x.shape[1])
        right = z.new_zeros(num_rows, z.shape[1]).index_copy(0, rows, z).view(-1, _BLOCK_ROWS, z.shape[1])
        # Every block produces a matrix, so their number at a time is limited.
        at_a_time = max(1, _COPIED_FLOATS // (x.shape[1] * z.shape[1]))
        total = x.new_zeros(len(self.counts), x.shape[1], z.shape[1])
        for some_left, some_right, experts in zip(
            left.split(at_a_time), right.split(at_a_time), block_experts.split(at_a_time), strict=True
        ):
            total.index_add_(0, experts, torch.bmm(some_left.transpose(1, 2), some_right))
        return total

    def add_outer_sum_(self, total: Tensor, x: Tensor, z: Tensor) -> None:
        """Add the `outer_sum` of two slot vectors to a sum, in place.

        Args:
            total: Sum `[E, d, k]`, which is written to.
            x: Slots `[S, d]`, sorted by expert, in the sum's dtype.
            z: Slots `[S, k]`, likewise.
        """
        if not devices.answers_at_once(total.device):
            total += self.outer_sum(x, z)
            return
        # The CPU's grouped kernel is a loop too, and writes to fresh memory, which costs more than the products.
        counts = self.counts.tolist()
        for of_expert, left, right in zip(total, x.split(counts), z.split(counts), strict=True):
            of_expert.addmm_(left.mT, right)

    def restored(self, values: Tensor) -> Tensor:
        """Undo the sorting of slot values `[S, ...]`."""
        places = torch.empty_like(self.order)
        places[self.order] = torch.arange(len(places), device=places.device)
        return values[places]

    def sum(self, values: Tensor) -> Tensor:
        """Sum slot values over the slots of each expert: `[S, ...]`, sorted by expert, to `[E, ...]`."""
        return values.new_zeros(len(self.counts), *values.shape[1:]).index_add_(0, self.experts, values)

    def _blocks(self) -> tuple[Tensor, Tensor, int]:
        """Pad the groups to blocks of equal height, each block for one expert.

        Returns:
            The padded row of each slot `[S]`, the expert of each block `[N]`, and the number of padded rows. `N` is an
            upper bound that needs no synchronisation with the device.
        """
        num_slots, num_experts = len(self.experts), len(self.counts)
        num_blocks = -(-num_slots // _BLOCK_ROWS) + num_experts
        blocks_end = ((self.counts + _BLOCK_ROWS - 1) // _BLOCK_ROWS).cumsum(0)
        blocks_start = torch.cat([blocks_end.new_zeros(1), blocks_end[:-1]])
        first_slot = self._offsets.long() - self.counts
        position = torch.arange(num_slots, device=self.experts.device) - first_slot[self.experts]
        rows = blocks_start[self.experts] * _BLOCK_ROWS + position
        block_index = torch.arange(num_blocks, device=self.experts.device)
        block_experts = torch.searchsorted(blocks_end, block_index, right=True).clamp(max=num_experts - 1)
        return rows, block_experts, num_blocks * _BLOCK_ROWS


class _BlockedProduct(torch.autograd.Function):
    """The blocked product; it saves its arguments for the backward pass, not a matrix for every block."""

    @staticmethod
    def forward(ctx: Any, groups: ExpertGroups, x: Tensor, weight: Tensor) -> Tensor:
        ctx.groups = groups
        ctx.save_for_backward(x, weight)
        # The kernel ignores autocast, so this does too.
        with torch.autocast(x.device.type, enabled=False):
            return groups._blocked_matmul(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        _, needs_x, needs_weight = ctx.needs_input_grad
        with torch.autocast(x.device.type, enabled=False):
            return (
                None,
                ctx.groups._blocked_matmul(gradient, weight.mT) if needs_x else None,
                ctx.groups.outer_sum(x, gradient) if needs_weight else None,
            )


def _kernel_fits(x: Tensor, other: Tensor) -> bool:
    """Whether torch's grouped matrix product supports these operands (rows must be aligned to 16 bytes)."""
    if not hasattr(F, "grouped_mm") or x.dtype not in _KERNEL_DTYPES or x.dtype != other.dtype:
        return False
    if x.is_cuda and (x.dtype != torch.bfloat16 or torch.cuda.get_device_capability(x.device) < (8, 0)):
        return False
    strides = [stride for tensor in (x, other) for stride in tensor.stride() if stride != 1]
    return (
        x.device.type in ("cpu", "cuda")
        and len(x) > 0
        # The product's gradient has rows as wide as the product, and the stride of a single column is arbitrary.
        and all(tensor.shape[-1] * x.element_size() % 16 == 0 for tensor in (x, other))
        and all(stride * x.element_size() % 16 == 0 for stride in strides)
        and x.data_ptr() % 16 == 0
        and other.data_ptr() % 16 == 0
        and x.stride(-1) == 1
        and 1 in other.stride()[-2:]
    )
