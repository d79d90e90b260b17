"""The inputs of every metric: log-probabilities `[N, K]` and targets `[N]`.

Log-probabilities are natural logarithms, each row normalised; an example with fewer than K classes has `-inf` in the
columns of absent ones. Probabilities and logits are refused, not detected: a detection would apply softmax twice as
soon as one probability is rounded above one. Computations are in float64, whatever the dtype of the input.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

NORMALISATION_TOLERANCE = 1e-3


def check_predictions(log_probs: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Check shapes and values, and convert both to the dtypes that all metrics compute in.

    The logsumexp of a row may differ from 0 by 1e-3, or by the rounding error of the input's dtype (up to
    `eps * log K`: bfloat16 has eight bits for each log-probability).

    Args:
        log_probs: Natural log-probabilities `[N, K]`, floating.
        target: Class indices `[N]`, integers in `[0, K)`.

    Returns:
        `log_probs` `[N, K]` in float64 and `target` `[N]` in int64.

    Raises:
        TypeError: If `log_probs` is not floating or `target` is not integer.
        ValueError: If shapes disagree, there are no examples, a value is NaN, a row is not normalised, or a target is
            out of range.
    """
    _check_shapes(log_probs, target)
    wide = check_log_probs(log_probs)
    num_classes = wide.shape[1]
    target = target.to(device=wide.device, dtype=torch.int64)
    low, high = int(target.min()), int(target.max())
    if low < 0 or high >= num_classes:
        raise ValueError(f"target must lie in [0, {num_classes}), the columns of log_probs; found {low} to {high}")
    return wide, target


def check_log_probs(log_probs: Tensor) -> Tensor:
    """Check log-probabilities of examples without labels, and convert them to float64; see `check_predictions`.

    Args:
        log_probs: Natural log-probabilities `[N, K]`, floating.

    Returns:
        `log_probs` `[N, K]` in float64.

    Raises:
        TypeError: If `log_probs` is not floating.
        ValueError: If it is not a matrix, there are no examples, a value is NaN, or a row is not normalised.
    """
    if not log_probs.is_floating_point():
        raise TypeError(f"log_probs must be a floating tensor, found {log_probs.dtype}")
    if log_probs.ndim != 2:
        raise ValueError(f"expected log_probs [N, K], found {list(log_probs.shape)}")
    if log_probs.numel() == 0:
        raise ValueError(f"log_probs is empty ({list(log_probs.shape)}); a metric needs at least one example")
    if torch.isnan(log_probs).any():
        rows = torch.isnan(log_probs).any(dim=1).nonzero().flatten()
        raise ValueError(f"log_probs has NaN in {len(rows)} rows, first in row {int(rows[0])}; check the logits")
    wide = _to_float64(log_probs)
    tolerance = max(NORMALISATION_TOLERANCE, torch.finfo(log_probs.dtype).eps * math.log(max(wide.shape[1], 2)))
    off = torch.logsumexp(wide, dim=1)
    bad = ~(off.abs() <= tolerance)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"rows of log_probs must have logsumexp 0 within {tolerance:.1e}, but row {row} has {float(off[row]):.6g}; "
            "if these are logits or probabilities, apply log_softmax or log first"
        )
    return wide


def top_label(log_probs: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Confidence of the most probable class, and whether that class is the target.

    Args:
        log_probs: Log-probabilities `[N, K]`, checked.
        target: Class indices `[N]`, checked.

    Returns:
        Confidence `[N]` clamped to [0, 1], and correctness `[N]` (0 or 1), both float64. Ties go to the first class.
    """
    top, predicted = log_probs.max(dim=1)
    return top.exp().clamp(0.0, 1.0), (predicted == target).double()


def _check_shapes(log_probs: Tensor, target: Tensor) -> None:
    if not log_probs.is_floating_point():
        raise TypeError(f"log_probs must be a floating tensor, found {log_probs.dtype}")
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise TypeError(f"target must hold class indices (int64), found {target.dtype}")
    if log_probs.ndim != 2 or target.ndim != 1 or log_probs.shape[0] != target.shape[0]:
        raise ValueError(
            f"expected log_probs [N, K] and target [N], found {list(log_probs.shape)} and {list(target.shape)}"
        )


def _to_float64(values: Tensor) -> Tensor:
    # MPS has no float64; the tensors are small, so the CPU does it.
    return values.cpu().double() if values.device.type == "mps" else values.double()
