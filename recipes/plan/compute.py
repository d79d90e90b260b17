"""Floating-point operations of a forward pass, a training step, a curvature batch and a prediction.

A product `[n, i] @ [i, o]` costs `2 n i o`. Counted are the matrices that every token passes through (attention,
routers, shared experts), the matrices of `top_k` experts for each token, queries times keys and scores times values
over all pairs of positions, and the head at the positions whose logits are computed. Element-wise operations are not
counted. All `T` tokens of a row count, as if none were padding.

A backward pass costs each product once for the gradient of its input, and once more for that of its weight if the
weight is trained. It ends at the first block with experts, since everything below is frozen.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from bmoe_lightning.curvature.sketch import EXACT_WIDTH
from bmoe_lightning.laplace.covariance import num_sweeps
from recipes.plan.architecture import Architecture, Block, Experts


@dataclass(frozen=True)
class Workload:
    """One batch.

    Attributes:
        batch_size: Number of rows of the batch, B.
        tokens: Number of tokens of a row, T.
        classes: Number of classes, K.
        rank: Rank of the factors, r.
    """

    batch_size: int
    tokens: int
    classes: int
    rank: int

    @property
    def positions(self) -> int:
        """Number of tokens of a batch."""
        return self.batch_size * self.tokens

    @property
    def contrasts(self) -> int:
        """Backward passes of a prediction and of the exact Fisher: K - 1, since softmax is invariant to a shift."""
        return self.classes - 1


def forward(model: Architecture, work: Workload) -> float:
    """Operations of one forward pass."""
    return sum(_block(block, model, work) for block in model.blocks) + _outside(model, work)


def active_macs(model: Architecture) -> int:
    """Multiply-adds of one token without attention scores: its active weights that are multiplied by something."""
    blocks = sum(block.weights + sum(e.top_k * e.matrices for e in block.experts) for block in model.blocks)
    return blocks + model.vocabulary * model.hidden + sum(out * into for out, into in model.outside)


def training_step(model: Architecture, work: Workload, trained: str) -> float:
    """Operations of a forward and a backward pass.

    Args:
        model: Sizes of the model.
        work: Batch.
        trained: Trained weights, `down_proj` or `experts`.
    """
    every = trained == "experts"
    total = forward(model, work) + backward(model, work)
    for block in model.blocks:
        for experts in block.experts:
            total += _per_token(experts.matrices if every else experts.second, experts, work)
    if every:
        # In the first block with experts the gradient reaches their first matrices through the second.
        for experts in model.blocks[model.first].experts:
            total += _per_token(experts.second, experts, work)
    return total


def backward(model: Architecture, work: Workload) -> float:
    """Operations of one backward pass to the outputs of all experts, without weight gradients."""
    above = sum(_block(block, model, work, backward=True) for block in model.blocks[model.first + 1 :])
    return above + _outside(model, work)


def curvature_batch(model: Architecture, work: Workload, fisher: str) -> float:
    """Operations of one batch of the curvature pass.

    Args:
        model: Sizes of the model.
        work: Batch.
        fisher: Labels of the Fisher, `exact` (K - 1 backward passes), `mc` or `empirical` (one).
    """
    passes = work.contrasts if fisher == "exact" else 1
    return forward(model, work) + passes * backward(model, work) + sketches(model, work, passes)


def sketches(model: Architecture, work: Workload, passes: int) -> float:
    """Operations of adding a batch to the sketches of all layers."""
    total = 0.0
    for block in model.blocks:
        for experts in block.experts:
            slots = experts.top_k * moving_tokens(model, block, work)
            layer = experts.layer
            total += slots * (sketch_slot(layer.d_in, work.rank) + passes * sketch_slot(layer.d_out, work.rank))
    return total


def sketch_slot(width: int, rank: int) -> int:
    """Operations of one slot in a sketch: an outer product `d x d`, or two products with `4 r` Nystrom columns."""
    return 2 * width**2 if width <= EXACT_WIDTH else 4 * width * min(4 * rank, width)


def prediction(model: Architecture, work: Workload) -> float:
    """Operations of one batch of predictions: forward, K - 1 backward passes, slot ownership, and kernels."""
    last = len(model.blocks) - 1 - next(i for i, b in enumerate(reversed(model.blocks)) if b.experts)
    above = sum(_block(block, model, work, backward=True) for block in model.blocks[last + 1 :])
    # The example of each slot follows from two gradients at the last expert layer.
    owners = 2 * (above + _outside(model, work))
    # Each group of layers takes passes of its own, which end at its first layer.
    repeated = (prediction_sweeps(model, work, model.dtype.itemsize) + 1) / 2
    return forward(model, work) + repeated * work.contrasts * backward(model, work) + owners + kernels(model, work)


def prediction_sweeps(model: Architecture, work: Workload, itemsize: int) -> int:
    """Number of groups of layers whose gradients are stored one after another; see `num_sweeps`."""
    slots = sum(work.positions * experts.top_k * experts.layer.d_out for experts in model.experts)
    return num_sweeps(work.contrasts, len(model.experts), itemsize * slots)


def kernels(model: Architecture, work: Workload) -> float:
    """Operations of the inner products and projections of a batch, over all layers.

    With uniform routing, the number `h` of an example's T tokens at an expert is binomial; groups are padded to the
    next of 1, 2, 3, 4, 6, 8, 12, ...
    """
    total = 0.0
    for block in model.blocks:
        for experts in block.experts:
            tokens = moving_tokens(model, block, work) // work.batch_size
            pairs = _expected(tokens, experts.share, lambda h, e=experts: group(h, e, work))  # type: ignore[misc]
            ranks = min(work.rank, experts.layer.d_in), min(work.rank, experts.layer.d_out)
            slot = 2 * (ranks[0] * experts.layer.d_in + work.contrasts * ranks[1] * experts.layer.d_out)
            total += work.batch_size * (experts.layer.num_experts * pairs + tokens * experts.top_k * slot)
    return total


def group(slots: int, experts: Experts, work: Workload) -> float:
    """Operations of the kernels of one example and expert with `slots` slots, in the cheaper of two ways."""
    layer, classes, padded = experts.layer, work.contrasts, height(slots)
    ranks = min(work.rank, layer.d_in), min(work.rank, layer.d_out)
    by_pairs = padded**2 * (layer.d_in + classes * layer.d_out) + classes**2 * padded * layer.d_out
    written_out = classes * (padded + classes) * layer.d_in * layer.d_out
    return 2 * min(by_pairs, written_out) + 2 * classes * ranks[0] * ranks[1] * padded


def height(slots: int) -> int:
    """The height that a group of slots is padded to: 0, 1, 2, 3, 4, 6, 8, 12, 16, ..."""
    if slots < 1:
        return 0
    power: int = 1 << (slots - 1).bit_length()
    return power * 3 // 4 if power > 2 and slots <= power * 3 // 4 else power


def moving_tokens(model: Architecture, block: Block, work: Workload) -> int:
    """Number of tokens of a batch whose expert outputs affect a logit: all, or the last of each row.

    It is the last one alone in the last block: attention precedes the experts, so only later blocks mix positions.
    """
    later = model.blocks[next(i for i, other in enumerate(model.blocks) if other is block) + 1 :]
    return work.positions if later else work.batch_size


def _expected(trials: int, probability: float, value: Callable[[int], float]) -> float:
    """Expectation of a function of a binomial count."""
    if probability >= 1:
        return value(trials)
    middle, spread = trials * probability, math.sqrt(trials * probability * (1 - probability))
    total = 0.0
    for count in range(max(0, int(middle - 10 * spread - 10)), min(trials, int(middle + 10 * spread + 10)) + 1):
        log = math.lgamma(trials + 1) - math.lgamma(count + 1) - math.lgamma(trials - count + 1)
        log += count * math.log(probability) + (trials - count) * math.log1p(-probability)
        total += math.exp(log) * value(count)
    return total


def _block(block: Block, model: Architecture, work: Workload, *, backward: bool = False) -> float:
    """Operations of a block's forward pass, or of its input's gradient, where attention counts twice (two factors)."""
    total = 2.0 * work.positions * block.weights
    total += sum(_per_token(experts.matrices, experts, work) for experts in block.experts)
    if block.attention:
        total += (2 if backward else 1) * 2 * work.positions * work.tokens * model.attention_width
    return total


def _per_token(weights: int, experts: Experts, work: Workload) -> float:
    return 2.0 * work.positions * experts.top_k * weights


def _outside(model: Architecture, work: Workload) -> float:
    """Operations of the head and of matrices outside of the blocks; the gradient of their input costs the same."""
    kept = work.batch_size if model.one_position else work.positions
    others = sum(out * into for out, into in model.outside)
    return 2.0 * kept * model.vocabulary * model.hidden + 2.0 * work.positions * others
