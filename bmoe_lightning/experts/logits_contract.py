"""The contract of `class_logits`: how it is called, and what it must return.

Shapes: `B` examples, `K` classes. K may differ between batches; missing columns are absent classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from bmoe_lightning.experts.batch_copies import WriteCheck, copied_containers
from bmoe_lightning.experts.sharded_calls import called_together

ClassLogits = Callable[[Any, Any], tuple[Tensor, Tensor | None]]
"""`(model, batch) -> (logits [B, K], labels [B] or None)`; an absent class is `-inf`, or see `ABSENT_GAP`."""

ABSENT_GAP = 5000.0
"""A class is absent if its logit is more than this below the largest one of its row, whatever the value.

Masks are `finfo(dtype).min` (-65504 in float16), -1e9 or -1e4, set or added, and all of these are. Logits of a token
head span tens, sums of log-probabilities over an answer's tokens hundreds; and beyond 745 a probability is zero in
float64. A mask of -100 or -1000 is no different from a logit, so it is read as one; see `looks_masked`.
"""

NO_LABEL = -(2**31)
"""Placeholder for a missing label; any other negative label is an error in the data."""

_MASK_GAP = 50.0


def run_class_logits(class_logits: ClassLogits, model: Any, batch: Any) -> tuple[Tensor, Any]:
    """Call `class_logits` on a copy of a batch's containers, and check the logits.

    Args:
        class_logits: Function `(model, batch) -> (logits [B, K], labels [B] or None)`.
        model: The model.
        batch: Batch as `class_logits` takes it. Inference tensors are cloned, since they cannot be part of a graph.

    Returns:
        Logits as returned, and labels, which `checked_labels` checks where they are used.

    Raises:
        TypeError: If it does not return a pair with a tensor.
        ValueError: If it does not return logits; see `check_logits`.
        RuntimeError: If it writes to a tensor of the batch.
        OtherRankError: If it fails on another rank, and the weights are sharded; see `called_together`.
    """
    given = copied_containers(batch, lambda values: values.clone() if values.is_inference() else values)
    writes = WriteCheck(given)
    with called_together(model):
        return _checked(class_logits(model, given), writes)


def _checked(found: Any, writes: WriteCheck) -> tuple[Tensor, Any]:
    if not isinstance(found, (tuple, list)) or len(found) != 2:
        raise TypeError(f"class_logits must return (logits, labels or None), got {type(found).__name__}")
    logits, labels = found
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"class_logits must return logits [B, K] as a tensor, got {type(logits).__name__}; return (logits, labels)"
        )
    writes.check("class_logits")
    check_logits(logits)
    return logits, labels


def present_classes(logits: Tensor) -> Tensor:
    """Mask `[B, K]`, False for absent classes: those more than `ABSENT_GAP` below the largest logit of their row."""
    values = logits.detach()
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    return (values >= values.amax(-1, keepdim=True) - ABSENT_GAP) & (values != -torch.inf)


def masked_logits(logits: Tensor) -> Tensor:
    """Logits `[B, K]` float64 with `-inf` for absent classes."""
    return logits.double().masked_fill(~present_classes(logits), -torch.inf)


def looks_masked(logits: Tensor) -> float | None:
    """A finite value that looks like a mask but is no absent class: in several rows the same, far below all logits.

    Args:
        logits: Logits `[B, K]`.
    """
    values, present = logits.detach().double(), present_classes(logits)
    far = values[present & (values < values.amax(-1, keepdim=True) - _MASK_GAP)]
    if len(far) < 2 or bool((far != far[0]).any()):
        return None
    return float(far[0])


def check_logits(logits: Tensor) -> None:
    """Check that a tensor may hold class logits. Log-probabilities may: they are logits, up to a shift.

    Raises:
        ValueError: If the shape is not `[B, K]` with K >= 2, a value is NaN or +inf, an example has fewer than two
            classes, or every row is a distribution.
    """
    if logits.dim() != 2 or logits.shape[1] < 2 or not logits.is_floating_point():
        raise ValueError(
            f"class_logits must return logits of shape [B, K] with K >= 2, got {logits.dtype} {tuple(logits.shape)}"
        )
    values = logits.detach().float()
    if len(values) and not bool((values.amax(-1) < torch.inf).all()):  # NaN is no smaller either
        raise ValueError(
            "class_logits returned NaN or +inf, so the weights or the input are broken. If training diverged, lower "
            "the learning rate, clip gradients (gradient_clip_val=1.0 in the trainer), or use bfloat16 or float32 "
            "rather than float16"
        )
    if not len(logits):
        return
    if bool((present_classes(logits).sum(-1) < 2).any()):
        raise ValueError(
            "class_logits returned an example with fewer than two classes (all others are -inf, or more than "
            f"{ABSENT_GAP:.0f} below the largest logit, which marks an absent class); leave such examples out"
        )
    # Rounding in the dtype of the probabilities; a single row of logits may sum to 1 by chance, several do not.
    tolerance = max(1e-3, torch.finfo(logits.dtype).eps) if len(logits) > 1 else 1e-5
    if bool(values.amin() >= 0) and bool(((values.sum(-1) - 1).abs() < tolerance).all() & (values <= 1).all()):
        raise ValueError(
            "class_logits returned probabilities (every row is non-negative and sums to 1); return the logits before "
            "the softmax"
        )


def checked_labels(labels: Any, logits: Tensor, *, values: bool = True) -> Tensor:
    """Check the labels that `class_logits` returned.

    Args:
        labels: The labels.
        logits: Logits `[B, K]`.
        values: Whether the labels are used; otherwise they may be placeholders (-100, say), and only their type counts.

    Returns:
        Labels `[B]` int64.

    Raises:
        ValueError: If they are not class indices `[B]`, one is out of range, or one names an absent class.
    """
    if not isinstance(labels, Tensor):
        raise ValueError(
            f"class_logits returned labels as a {type(labels).__name__}; return a tensor [B] of class indices (int64)"
        )
    size, num_classes = logits.shape
    if labels.shape == logits.shape and labels.dim() == 2:
        raise ValueError(
            f"class_logits returned labels of shape {tuple(labels.shape)}, that of the logits: they look one-hot; "
            "return class indices [B], as by labels.argmax(-1)"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"class_logits returned labels as {labels.dtype}; return class indices as integers (int64)")
    if labels.shape != (size,):
        raise ValueError(
            f"class_logits returned logits {tuple(logits.shape)} and labels {tuple(labels.shape)}; return one row of "
            "logits [B, K] and one label [B] for each example"
        )
    labels = labels.detach().long()
    if values and size:
        _check_values(labels, logits, num_classes)
    return labels


def _check_values(labels: Tensor, logits: Tensor, num_classes: int) -> None:
    low, high = int(labels.min()), int(labels.max())
    if low == NO_LABEL:
        raise ValueError("class_logits returned labels for some batches and None for others; return labels for all")
    if low < 0 or high >= num_classes:
        outside = sorted(set(labels[(labels < 0) | (labels >= num_classes)].tolist()))
        named = ", ".join(map(str, outside[:5]))
        remedy = "return class indices 0 to K - 1"
        if low < 0:
            remedy = "leave unlabelled examples out (-100 is only the index that a loss ignores)"
        elif outside == [num_classes] and low > 0:
            remedy = "they seem to be counted from 1: return labels - 1"
        raise ValueError(f"class_logits returned the labels {named} for K = {num_classes} classes; {remedy}")
    absent = (~present_classes(logits)).gather(1, labels.to(logits.device).unsqueeze(1)).squeeze(1)
    if bool(absent.any()):
        raise ValueError(
            f"{int(absent.sum())} labels name a class that their example does not have (its logit is -inf or masked), "
            f"the first is example {int(absent.nonzero()[0])}; check labels and class mask"
        )


def joined_logits(parts: Sequence[Tensor], num_classes: int = 0) -> Tensor:
    """Concatenate logits or log-probabilities of batches, with `-inf` for classes that only other batches have.

    Args:
        parts: Values `[n, K_i]` of each batch.
        num_classes: Minimum number of columns of the result.
    """
    width = max([num_classes, *(part.shape[1] for part in parts)])
    return torch.cat([pad(part, (0, width - part.shape[1]), value=-torch.inf) for part in parts])
