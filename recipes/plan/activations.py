"""Bytes of activations, which are estimated.

Autograd saves for backward, in each decoder block above the first one with experts (below it nothing requires a
gradient), over `n` tokens and with frozen weights unless noted:

- for every matrix that tokens pass through, its output; for one that maps back to the model's width, its input (a
  product of activations, or the attention's output); for a gate of width one, its other factor;
- for every normalisation, its input in float32;
- for every slot, the first matrices' output, the activated gate, and the second matrix's output before the routing
  weight; with trained weights also their inputs, and with dropout a mask of one byte.

Where torch's grouped kernel does not support the experts' dtype or widths, a product saves its input with frozen
weights too. It then pads slots to blocks and copies a matrix for each block, a limited number at a time; these copies
are not saved.

Attention is assumed to use one of torch's fused kernels, which save no scores.
"""

from __future__ import annotations

from dataclasses import dataclass

from bmoe_lightning.curvature.sketch import EXACT_WIDTH
from recipes.plan.architecture import Architecture, Experts
from recipes.plan.compute import Workload

# Of the dtypes of a plan, torch's grouped product supports bfloat16 alone on a GPU.
_KERNEL_BYTES = 2
# It requires rows of a multiple of this many bytes.
_KERNEL_ALIGNMENT = 16
# Of a slot: its expert, and its places after sorting and among the blocks, for inputs and gradients.
_INDEX_BYTES = 8 * 6
# Rows of a block in which experts share one batched product, where no grouped kernel fits, and how many weights are
# copied for such blocks at a time.
_BLOCK_ROWS = 32
_COPIED_WEIGHTS = 1 << 26
# A chunk of the prediction's kernels: 2^24 float32 values, and their intermediate results.
_CHUNK = 5 * (1 << 24)


@dataclass(frozen=True)
class Precision:
    """Bytes of a weight: of the always frozen ones, of the experts' first matrices and of their second ones."""

    frozen: int
    first: int
    second: int


def saved_bytes(
    model: Architecture, work: Workload, precision: Precision, trained: str | None, *, dropout: bool = False
) -> list[int]:
    """Bytes that autograd saves for each block, estimated as the module describes.

    Args:
        model: Sizes of the model.
        work: Batch.
        precision: Bytes of a weight.
        trained: Trained weights, `down_proj`, `experts`, or None where gradients end at the second matrices' outputs.
        dropout: Whether there is dropout in the experts.
    """
    kept = []
    for position, block in enumerate(model.blocks):
        above, total = position > model.first, 0
        if above:
            total += 4 * work.positions * model.hidden * block.norms
            total += precision.frozen * work.positions * sum(_side(*shape, model.hidden) for shape in block.matrices)
        if position >= model.first:
            for experts in block.experts:
                a_slot = _slot_bytes(experts, precision, trained, dropout=dropout, above=above)
                total += work.positions * experts.top_k * a_slot
        kept.append(total)
    return kept


def _side(out: int, into: int, hidden: int) -> int:
    """Values for each token that autograd saves for a frozen matrix."""
    return into if out in (1, hidden) else out


def _slot_bytes(experts: Experts, precision: Precision, trained: str | None, *, dropout: bool, above: bool) -> int:
    d_in, d_out = experts.layer.d_in, experts.layer.d_out
    total = 0
    if above or trained == "experts":
        total += precision.first * (experts.first_width + (d_in if experts.gated else 0))
    if above:
        total += precision.second * d_out
    if trained is not None:
        total += precision.second * d_in
    elif above and precision.first != precision.second and not _has_kernel(experts, precision.second):
        total += precision.second * d_in  # in the dtype of the second matrices; taps record it in that of the first
    if trained == "experts" or (above and experts.products.first and not _has_kernel(experts, precision.first)):
        total += precision.first * d_out
    return total + (d_in if dropout and (above or trained == "experts") else 0)


def _has_kernel(experts: Experts, size: int) -> bool:
    """Whether torch's grouped product on a GPU supports weights of this size in bytes, if experts share a product."""
    if not experts.products.second:
        return True
    widths = (experts.layer.d_in, experts.layer.d_out, experts.first_width)
    return size == _KERNEL_BYTES and all(width * size % _KERNEL_ALIGNMENT == 0 for width in widths)


def product_bytes(model: Architecture, work: Workload, precision: Precision, trained: str | None) -> int:
    """Transient memory of the largest product of slots and their experts' matrices without the grouped kernel.

    It holds the incoming gradient, the padded blocks on both sides, and copies of matrices or a second copy of the
    product; for the gradient of a trained matrix, one matrix for every block.
    """
    most = 0
    for experts in model.experts:
        d_in, d_out = experts.layer.d_in, experts.layer.d_out
        slots, blocks = work.positions * experts.top_k, _product_blocks(experts, work)
        shared = [(d_in, d_out, precision.second, trained is not None)]
        if experts.products.first:
            shared.append((d_out, experts.first_width, precision.first, trained == "experts"))
        for into, out, size, has_gradient in shared:
            if not _has_kernel(experts, size):
                at_a_time = min(blocks, max(1, _COPIED_WEIGHTS // (into * out)))
                moment = max(at_a_time * into * out, blocks * _BLOCK_ROWS * max(into, out))
                gradient = (blocks + experts.layer.num_experts) * into * out if has_gradient else 0
                rows = slots * out + blocks * _BLOCK_ROWS * (into + out)
                most = max(most, size * (rows + max(moment, gradient)))
    return most


def _product_blocks(experts: Experts, work: Workload) -> int:
    return -(-work.positions * experts.top_k // _BLOCK_ROWS) + experts.layer.num_experts


def layer_gradient_bytes(experts: Experts, work: Workload, precision: Precision) -> int:
    """The gradient of one pass with respect to the outputs of all slots of a layer; twice for separate modules."""
    copies = 1 if experts.products.second else 2
    return copies * precision.second * work.positions * experts.top_k * experts.layer.d_out


def tapped_bytes(model: Architecture, work: Workload, precision: Precision, *, checkpointing: bool) -> int:
    """Bytes alive after a tapped forward pass: saved tensors, all inputs, and the outputs at which gradients end."""
    inputs = sum(work.positions * experts.top_k * experts.layer.d_in for experts in model.experts)
    ends = sum(work.positions * e.top_k * e.layer.d_out for e in model.blocks[model.first].experts)
    saved = saved_bytes(model, work, precision, None)
    kept = max(saved) + entrance_bytes(model, work) if checkpointing else sum(saved)
    return kept + precision.first * inputs + precision.second * ends


def entrance_bytes(model: Architecture, work: Workload) -> int:
    """Bytes that gradient checkpointing saves: the input of every block."""
    return model.dtype.itemsize * work.positions * model.hidden * len(model.blocks)


def adding_bytes(experts: Experts, work: Workload, precision: Precision) -> int:
    """Transients of adding one layer's slots to its sketches: sorted, then in float32 and padded to blocks."""
    slots, blocks = work.positions * experts.top_k, _product_blocks(experts, work)

    def side(width: int, size: int) -> int:
        selecting = max(2 * size, size + 4 if size < 4 else 0) * slots * width
        columns = width if width <= EXACT_WIDTH else min(4 * work.rank, width)
        sums = (blocks + experts.layer.num_experts) * width * columns
        layout = 4 * (blocks * _BLOCK_ROWS * (width + columns) + sums)
        return _INDEX_BYTES * slots + max(selecting, 4 * slots * (width + columns) + layout)

    return max(side(experts.layer.d_in, precision.first), side(experts.layer.d_out, precision.second))


def kernel_bytes(experts: Experts, work: Workload) -> int:
    """A chunk of one layer's slots in float32: inputs, gradients, and the gradients summed over pairs."""
    slots, gradients = work.positions * experts.top_k, work.contrasts * experts.layer.d_out
    return min(_CHUNK, 8 * slots * (experts.layer.d_in + gradients))
