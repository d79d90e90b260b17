"""Equal-width bins of top-label confidence, and the sums per bin that all binned metrics are computed from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torchmetrics import Metric

from bmoe_lightning.metrics.base import add_to_state
from bmoe_lightning.metrics.inputs import check_predictions, top_label

BinConvention = Literal["right", "left"]
"""Closed side of a bin: `right` is (lo, hi] (Guo et al. 2017, https://arxiv.org/abs/1706.04599), `left` is [lo, hi)."""


@dataclass(frozen=True)
class Binning:
    """Number and convention of the confidence bins.

    Args:
        num_bins: Number of equal-width bins B.
        convention: Closed side of the bins.

    Raises:
        ValueError: If either is not supported.
    """

    num_bins: int = 15
    convention: BinConvention = "right"

    def __post_init__(self) -> None:
        if self.num_bins < 1:
            raise ValueError(f"num_bins must be at least 1, found {self.num_bins}")
        if self.convention not in get_args(BinConvention):
            raise ValueError(f"convention must be one of {get_args(BinConvention)}, found {self.convention!r}")

    def __str__(self) -> str:
        interval = "(lo, hi]" if self.convention == "right" else "[lo, hi)"
        return f"{self.num_bins} equal-width bins {interval}"


class BinTotals(NamedTuple):
    """Sums per confidence bin; the sums of parts of the data add up to those of all.

    Attributes:
        number: Number of examples, `[B]` float64.
        confidence: Sum of top-label confidences, `[B]` float64.
        correct: Number of correctly classified examples, `[B]` float64.
    """

    number: Tensor
    confidence: Tensor
    correct: Tensor


def bin_edges(num_bins: int, device: torch.device | None = None) -> Tensor:
    """Edges of the bins, `[B + 1]` float64, equally spaced from 0 to 1.

    Args:
        num_bins: Number of bins B.
        device: Device of the result.
    """
    return torch.linspace(0.0, 1.0, num_bins + 1, dtype=torch.float64, device=device)


def bin_index(confidence: Tensor, binning: Binning) -> Tensor:
    """Bin of each example, `[N]` int64 in `[0, B)`.

    Confidence 0 belongs to the first bin and confidence 1 to the last under both conventions.

    Args:
        confidence: Confidences `[N]`, float64 in [0, 1].
        binning: Number of bins and convention.
    """
    inner = bin_edges(binning.num_bins, confidence.device)[1:-1]
    # torch names the side the other way round: its right=True closes a bin on the left.
    return torch.bucketize(confidence, inner, right=binning.convention == "left")


def bin_totals(log_probs: Tensor, target: Tensor, binning: Binning) -> BinTotals:
    """Sums per bin over a batch.

    Args:
        log_probs: Log-probabilities `[N, K]`, checked.
        target: Class indices `[N]`, checked.
        binning: Number of bins and convention.
    """
    confidence, correct = top_label(log_probs, target)
    index = bin_index(confidence, binning)
    zeros = torch.zeros(binning.num_bins, dtype=torch.float64, device=confidence.device)
    return BinTotals(
        zeros.scatter_add(0, index, torch.ones_like(confidence)),
        zeros.scatter_add(0, index, confidence),
        zeros.scatter_add(0, index, correct),
    )


class MetricOverBins(Metric):
    """Base class of binned metrics; a subclass defines `prefix`, and computes its value from `totals`.

    Args:
        num_bins: Number of bins.
        convention: Closed side of the bins.
        kwargs: Passed on to `torchmetrics.Metric`.

    Raises:
        ValueError: If a setting is not supported.
    """

    is_differentiable = False
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    prefix: str

    def __init__(self, num_bins: int = 15, convention: BinConvention = "right", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.binning = Binning(num_bins, convention)
        for state in BinTotals._fields:
            self.add_state(f"{self.prefix}_{state}", torch.zeros(num_bins, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, log_probs: Tensor, target: Tensor) -> None:
        """Add a batch.

        Args:
            log_probs: Normalised natural log-probabilities, `[N, K]`.
            target: Class indices, `[N]`.

        Raises:
            TypeError: If a tensor has the wrong dtype; see `check_predictions`.
            ValueError: If the predictions are refused; see `check_predictions`.
        """
        totals = bin_totals(*check_predictions(log_probs, target), self.binning)
        for state, value in totals._asdict().items():
            add_to_state(self, f"{self.prefix}_{state}", value)

    def totals(self) -> BinTotals:
        """Sums per bin over all examples so far."""
        return BinTotals(*(getattr(self, f"{self.prefix}_{state}") for state in BinTotals._fields))
