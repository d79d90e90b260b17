"""Calibration metrics as pure functions of log-probabilities.

Every function takes ``log_probs [N, K]`` (natural logarithm, each row normalised) and ``target [N]`` (integer class).
An example with fewer than K classes has ``-inf`` in the columns it lacks. Probabilities and logits are refused rather
than guessed at: a guess soft-maxes the whole batch a second time as soon as one probability is rounded above one.
Everything is computed in float64, whatever the dtype of the input.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

BinConvention = Literal["right", "left"]
"""Which edge of a confidence bin is closed: ``right`` is (lo, hi] as in Guo et al. 2017, ``left`` is [lo, hi)."""

CalibrationNorm = Literal["l1", "l2", "max"]
"""How gaps are combined over bins: mean absolute (ECE), root mean square, or the largest (MCE)."""

NORMALISATION_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class ReliabilityCurve:
    """Confidence against accuracy, per bin of top-label confidence.

    Attributes:
        bin_edges: ``[B + 1]``, equally spaced from 0 to 1.
        confidence: ``[B]``, mean confidence of the bin's examples; NaN where the bin is empty.
        accuracy: ``[B]``, fraction of the bin's examples that were right; NaN where the bin is empty.
        count: ``[B]``, number of examples.
    """

    bin_edges: Tensor
    confidence: Tensor
    accuracy: Tensor
    count: Tensor


class BinTotals(NamedTuple):
    """Sums per confidence bin, from which every binned metric follows; sums of parts add up to the whole.

    Attributes:
        number: ``[B]`` float64, number of examples.
        confidence: ``[B]`` float64, sum of top-label confidences.
        correct: ``[B]`` float64, number of examples that were right.
    """

    number: Tensor
    confidence: Tensor
    correct: Tensor


def check_predictions(log_probs: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Check shapes and values, and bring both to the dtypes all metrics compute in.

    Rows may miss normalisation by 1e-3, or by what rounding to the input's own dtype explains (bfloat16 keeps eight
    bits of each log-probability, which moves the sum by up to ``eps * log K``).

    Args:
        log_probs: ``[N, K]`` floating, natural logarithm.
        target: ``[N]`` integer, in ``[0, K)``.

    Returns:
        ``log_probs [N, K]`` in float64 and ``target [N]`` in int64.

    Raises:
        TypeError: If ``log_probs`` is not floating or ``target`` is not integer.
        ValueError: If shapes disagree, there are no examples, a value is NaN, a row is not normalised, or a target is
            out of range.
    """
    _check_shapes(log_probs, target)
    if torch.isnan(log_probs).any():
        rows = torch.isnan(log_probs).any(dim=1).nonzero().flatten()
        raise ValueError(f"log_probs holds NaN in {len(rows)} rows, the first is row {int(rows[0])}.")
    wide = _to_float64(log_probs)
    num_classes = wide.shape[1]
    tolerance = max(NORMALISATION_TOLERANCE, torch.finfo(log_probs.dtype).eps * math.log(max(num_classes, 2)))
    off = torch.logsumexp(wide, dim=1)
    bad = ~(off.abs() <= tolerance)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"Rows of log_probs must have logsumexp 0 within {tolerance:.1e}, but row {row} has {float(off[row]):.6g}: "
            "got logits or probabilities? apply log_softmax first."
        )
    target = target.to(device=wide.device, dtype=torch.int64)
    low, high = int(target.min()), int(target.max())
    if low < 0 or high >= num_classes:
        raise ValueError(f"target must lie in [0, {num_classes}), the columns of log_probs; found {low} to {high}.")
    return wide, target


def _check_shapes(log_probs: Tensor, target: Tensor) -> None:
    if not log_probs.is_floating_point():
        raise TypeError(f"log_probs must be a floating tensor, found {log_probs.dtype}.")
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise TypeError(f"target must hold class indices (int64), found {target.dtype}.")
    if log_probs.ndim != 2 or target.ndim != 1 or log_probs.shape[0] != target.shape[0]:
        raise ValueError(
            f"Expected log_probs [N, K] and target [N], found {list(log_probs.shape)} and {list(target.shape)}."
        )
    if log_probs.numel() == 0:
        raise ValueError(f"log_probs is empty ({list(log_probs.shape)}): a metric needs at least one example.")


def _to_float64(values: Tensor) -> Tensor:
    # MPS has no float64; the tensors are small, so the CPU does it.
    return values.cpu().double() if values.device.type == "mps" else values.double()


def top_label(log_probs: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Confidence of the most probable class, and whether that class is right.

    Args:
        log_probs: ``[N, K]``, checked.
        target: ``[N]``, checked.

    Returns:
        Confidence ``[N]`` clamped to [0, 1], and correctness ``[N]`` (0 or 1), both float64. Ties go to the first
        class.
    """
    top, predicted = log_probs.max(dim=1)
    return top.exp().clamp(0.0, 1.0), (predicted == target).double()


def example_nll(log_probs: Tensor, target: Tensor) -> Tensor:
    """Negative log-likelihood of each example, ``[N]`` in nats; warns where it is infinite.

    Args:
        log_probs: ``[N, K]``, checked.
        target: ``[N]``, checked.
    """
    losses = -log_probs.gather(1, target[:, None]).squeeze(1)
    infinite = int(torch.isinf(losses).sum())
    if infinite:
        warnings.warn(
            f"{infinite} of {len(losses)} examples give their target probability zero, so the NLL is infinite: either "
            "the target is a class the example does not have, or its probability underflowed.",
            stacklevel=2,
        )
    return losses


def example_brier(log_probs: Tensor, target: Tensor) -> Tensor:
    """Squared error of each example's probabilities, summed over classes: ``[N]`` in [0, 2].

    Args:
        log_probs: ``[N, K]``, checked.
        target: ``[N]``, checked.
    """
    probabilities = log_probs.exp()
    truth = torch.zeros_like(probabilities).scatter_(1, target[:, None], 1.0)
    return (probabilities - truth).square().sum(dim=1)


def accuracy(log_probs: Tensor, target: Tensor) -> Tensor:
    """Fraction of examples whose most probable class is the target.

    Args:
        log_probs: ``[N, K]``, normalised natural log-probabilities.
        target: ``[N]``, class indices.

    Returns:
        A float64 scalar in [0, 1].

    Raises:
        TypeError: See :func:`check_predictions`.
        ValueError: See :func:`check_predictions`.
    """
    return top_label(*check_predictions(log_probs, target))[1].mean()


def negative_log_likelihood(log_probs: Tensor, target: Tensor) -> Tensor:
    """Mean negative log-likelihood in nats.

    An example that gives its target probability zero makes the result infinite, with a warning.

    Args:
        log_probs: ``[N, K]``, normalised natural log-probabilities.
        target: ``[N]``, class indices.

    Returns:
        A float64 scalar.

    Raises:
        TypeError: See :func:`check_predictions`.
        ValueError: See :func:`check_predictions`.
    """
    return example_nll(*check_predictions(log_probs, target)).mean()


def brier_score(log_probs: Tensor, target: Tensor) -> Tensor:
    """Mean over examples of the squared error summed over classes (Brier 1950): 0 is perfect, 2 the worst.

    Args:
        log_probs: ``[N, K]``, normalised natural log-probabilities.
        target: ``[N]``, class indices.

    Returns:
        A float64 scalar in [0, 2].

    Raises:
        TypeError: See :func:`check_predictions`.
        ValueError: See :func:`check_predictions`.
    """
    return example_brier(*check_predictions(log_probs, target)).mean()


def check_binning(num_bins: int, convention: str, norm: str = "l1") -> None:
    """Refuse settings of a binned metric that mean nothing.

    Args:
        num_bins: Number of equal-width bins.
        convention: See :data:`BinConvention`.
        norm: See :data:`CalibrationNorm`.

    Raises:
        ValueError: If a setting is not one of those supported.
    """
    if num_bins < 1:
        raise ValueError(f"num_bins must be at least 1, found {num_bins}.")
    if convention not in get_args(BinConvention):
        raise ValueError(f"convention must be one of {get_args(BinConvention)}, found {convention!r}.")
    if norm not in get_args(CalibrationNorm):
        raise ValueError(f"norm must be one of {get_args(CalibrationNorm)}, found {norm!r}.")


def bin_index(confidence: Tensor, num_bins: int, convention: BinConvention) -> Tensor:
    """Index of the equal-width confidence bin of each example.

    Confidence 0 belongs to the first bin and confidence 1 to the last under both conventions.

    Args:
        confidence: ``[N]`` float64 in [0, 1].
        num_bins: Number of bins B.
        convention: See :data:`BinConvention`.

    Returns:
        ``[N]`` int64 in ``[0, B)``.
    """
    inner = bin_edges(num_bins, confidence.device)[1:-1]
    # torch names the side the other way round: its right=True closes a bin on the left.
    return torch.bucketize(confidence, inner, right=convention == "left")


def bin_edges(num_bins: int, device: torch.device | None = None) -> Tensor:
    """Edges of the bins: ``[B + 1]`` float64, equally spaced from 0 to 1.

    Args:
        num_bins: Number of bins B.
        device: Where to put them.
    """
    return torch.linspace(0.0, 1.0, num_bins + 1, dtype=torch.float64, device=device)


def bin_totals(log_probs: Tensor, target: Tensor, num_bins: int, convention: BinConvention) -> BinTotals:
    """Sums per confidence bin over a batch.

    Args:
        log_probs: ``[N, K]``, checked.
        target: ``[N]``, checked.
        num_bins: Number of bins B.
        convention: See :data:`BinConvention`.
    """
    confidence, correct = top_label(log_probs, target)
    index = bin_index(confidence, num_bins, convention)
    zeros = torch.zeros(num_bins, dtype=torch.float64, device=confidence.device)
    return BinTotals(
        zeros.scatter_add(0, index, torch.ones_like(confidence)),
        zeros.scatter_add(0, index, confidence),
        zeros.scatter_add(0, index, correct),
    )


def calibration_error_from_totals(totals: BinTotals, norm: CalibrationNorm = "l1") -> Tensor:
    """Calibration error from sums per bin; NaN if there is no example at all.

    Args:
        totals: Sums per bin, see :class:`BinTotals`.
        norm: See :data:`CalibrationNorm`.
    """
    gap = (totals.correct - totals.confidence).abs()
    total = totals.number.sum()
    if norm == "l1":
        return gap.sum() / total
    per_bin = gap / totals.number.clamp(min=1.0)
    if norm == "l2":
        return ((per_bin.square() * totals.number).sum() / total).sqrt()
    return torch.where(total > 0, per_bin.max(), torch.nan)


def curve_from_totals(totals: BinTotals) -> ReliabilityCurve:
    """Reliability curve from sums per bin.

    Args:
        totals: Sums per bin, see :class:`BinTotals`.
    """
    edges = bin_edges(len(totals.number), totals.number.device)
    # 0 / 0 gives the NaN that marks an empty bin.
    return ReliabilityCurve(edges, totals.confidence / totals.number, totals.correct / totals.number, totals.number)


def expected_calibration_error(
    log_probs: Tensor,
    target: Tensor,
    *,
    num_bins: int = 15,
    convention: BinConvention = "right",
    norm: CalibrationNorm = "l1",
) -> Tensor:
    """Top-label calibration error over equal-width confidence bins (Naeini et al. 2015; Guo et al. 2017, eq. 3).

    With ``convention="left"`` it equals ``torchmetrics`` except for a confidence of exactly 1, which torchmetrics puts
    in a bin of its own.

    Args:
        log_probs: ``[N, K]``, normalised natural log-probabilities.
        target: ``[N]``, class indices.
        num_bins: Number of bins.
        convention: See :data:`BinConvention`.
        norm: See :data:`CalibrationNorm`.

    Returns:
        A float64 scalar in [0, 1].

    Raises:
        TypeError: See :func:`check_predictions`.
        ValueError: See :func:`check_predictions` and :func:`check_binning`.
    """
    check_binning(num_bins, convention, norm)
    return calibration_error_from_totals(bin_totals(*check_predictions(log_probs, target), num_bins, convention), norm)


def reliability_curve(
    log_probs: Tensor, target: Tensor, *, num_bins: int = 15, convention: BinConvention = "right"
) -> ReliabilityCurve:
    """Mean confidence and accuracy per confidence bin (DeGroot and Fienberg 1983).

    Args:
        log_probs: ``[N, K]``, normalised natural log-probabilities.
        target: ``[N]``, class indices.
        num_bins: Number of bins.
        convention: See :data:`BinConvention`.

    Raises:
        TypeError: See :func:`check_predictions`.
        ValueError: See :func:`check_predictions` and :func:`check_binning`.
    """
    check_binning(num_bins, convention)
    return curve_from_totals(bin_totals(*check_predictions(log_probs, target), num_bins, convention))


def misclassification_auroc(log_probs: Tensor, target: Tensor) -> Tensor:
    """Probability that a right answer is more confident than a wrong one, ties counting half (AUROC).

    Exact, from average ranks (Mann-Whitney). NaN, with a warning, where all answers are right or all are wrong.

    Args:
        log_probs: ``[N, K]``, normalised natural log-probabilities.
        target: ``[N]``, class indices.

    Returns:
        A float64 scalar in [0, 1].

    Raises:
        TypeError: See :func:`check_predictions`.
        ValueError: See :func:`check_predictions`.
    """
    log_probs, target = check_predictions(log_probs, target)
    # The log-probability, not its exponential: confidences next to 1 stay apart.
    score, predicted = log_probs.max(dim=1)
    correct = predicted == target
    num_right = int(correct.sum())
    num_wrong = len(correct) - num_right
    if not num_right or not num_wrong:
        warnings.warn(
            f"The AUROC needs right and wrong answers, found {num_right} right and {num_wrong} wrong: returning NaN.",
            stacklevel=2,
        )
        return torch.full((), torch.nan, dtype=torch.float64, device=log_probs.device)
    _, group, size = torch.unique(score, return_inverse=True, return_counts=True)
    average_rank = size.cumsum(0).double() - (size.double() - 1) / 2
    rank_sum = average_rank[group][correct].sum()
    return (rank_sum - num_right * (num_right + 1) / 2) / (num_right * num_wrong)
