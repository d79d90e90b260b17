"""Expected calibration error.

Naeini et al. 2015 (https://doi.org/10.1609/aaai.v29i1.9602); in the form of Guo et al. 2017, eq. 3
(https://arxiv.org/abs/1706.04599).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from bmoe_lightning.metrics.binning import BinConvention, Binning, BinTotals, MetricOverBins, bin_index, bin_totals
from bmoe_lightning.metrics.inputs import check_predictions, top_label
from bmoe_lightning.metrics.spec import MetricSpec, Resamples

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CalibrationNorm = Literal["l1", "l2", "max"]
"""How gaps are combined over bins: mean absolute (ECE), root mean square, or the largest (MCE)."""


def expected_calibration_error(
    log_probs: Tensor,
    target: Tensor,
    *,
    num_bins: int = 15,
    convention: BinConvention = "right",
    norm: CalibrationNorm = "l1",
) -> Tensor:
    """Top-label calibration error over equal-width confidence bins.

    With `convention="left"` it equals `torchmetrics` except for a confidence of exactly 1, which torchmetrics puts in a
    separate bin.

    Args:
        log_probs: Normalised natural log-probabilities, `[N, K]`.
        target: Class indices, `[N]`.
        num_bins: Number of bins.
        convention: Closed side of the bins.
        norm: How gaps are combined over bins.

    Returns:
        A float64 scalar in [0, 1].

    Raises:
        TypeError: If a tensor has the wrong dtype; see `check_predictions`.
        ValueError: If the predictions are refused, see `check_predictions`, or a setting is not supported.
    """
    _check_norm(norm)
    binning = Binning(num_bins, convention)
    return calibration_error(bin_totals(*check_predictions(log_probs, target), binning), norm)


def calibration_error(totals: BinTotals, norm: CalibrationNorm = "l1") -> Tensor:
    """Calibration error from sums per bin; NaN without examples.

    Args:
        totals: Sums per bin.
        norm: How gaps are combined over bins.
    """
    gap = (totals.correct - totals.confidence).abs()
    total = totals.number.sum()
    if norm == "l1":
        return gap.sum() / total
    per_bin = gap / totals.number.clamp(min=1.0)
    if norm == "l2":
        return ((per_bin.square() * totals.number).sum() / total).sqrt()
    return torch.where(total > 0, per_bin.max(), torch.nan)


class ExpectedCalibrationError(MetricOverBins):
    """Top-label calibration error over equal-width bins; twin of `expected_calibration_error`.

    Args:
        num_bins: Number of bins.
        convention: Closed side of the bins.
        norm: How gaps are combined over bins.
        kwargs: Passed on to `torchmetrics.Metric`.

    Raises:
        ValueError: If a setting is not supported.
    """

    higher_is_better = False
    prefix = "ece"

    ece_number: Tensor
    ece_confidence: Tensor
    ece_correct: Tensor

    def __init__(
        self,
        num_bins: int = 15,
        convention: BinConvention = "right",
        norm: CalibrationNorm = "l1",
        **kwargs: Any,
    ) -> None:
        _check_norm(norm)
        super().__init__(num_bins, convention, **kwargs)
        self.norm: CalibrationNorm = norm

    def compute(self) -> Tensor:
        """Calibration error of all examples so far, a float64 scalar; NaN, with a warning, before any update."""
        return calibration_error(self.totals(), self.norm)

    def plot(self, val: Any = None, ax: Axes | None = None) -> Any:
        """Plot with `torchmetrics`, which needs matplotlib.

        Args:
            val: A value or a sequence of them; None for the value so far.
            ax: Axes to draw on; a new figure if None.
        """
        return self._plot(val, ax)


def _check_norm(norm: str) -> None:
    if norm not in get_args(CalibrationNorm):
        raise ValueError(f"norm must be one of {get_args(CalibrationNorm)}, found {norm!r}")


def convention_text(binning: Binning) -> str:
    """The convention of the ECE in words.

    Args:
        binning: Number of bins and convention.
    """
    return f"top-label confidence, {binning}, weighted by the items in a bin"


def _resampled(log_probs: Tensor, target: Tensor, binning: Binning) -> Callable[[Resamples], Tensor]:
    # The ECE of a resample is sum_b |sum of (correct - confidence) over its examples in bin b| / N.
    confidence, correct = top_label(log_probs, target)
    gaps = torch.zeros(len(target), binning.num_bins, dtype=torch.float64)
    gaps.scatter_(1, bin_index(confidence, binning)[:, None], (correct - confidence)[:, None])
    return lambda resamples: (resamples.counts @ gaps).abs().sum(dim=1) / len(target)


SPEC = MetricSpec(
    name="ece",
    title="ECE",
    higher_is_better=False,
    definition="mean absolute gap between confidence and accuracy over 15 equal-width bins (lo, hi] of the top label's "
    "confidence, weighted by the examples in a bin",
    lower=0.0,
    upper=1.0,
    value=lambda log_probs, target, binning: calibration_error(bin_totals(log_probs, target, binning)),
    resampled=_resampled,
    torchmetric=lambda binning: ExpectedCalibrationError(binning.num_bins, binning.convention),
    note=lambda binning: f"ECE: {convention_text(binning)}.",
)
