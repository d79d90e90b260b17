"""Calibration error over bins of equal mass (Nguyen and O'Connor 2015, https://aclanthology.org/D15-1182)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bmoe_lightning.metrics.base import OverAllExamples, WeightedValue, once
from bmoe_lightning.metrics.binning import Binning
from bmoe_lightning.metrics.inputs import check_predictions, top_label
from bmoe_lightning.metrics.ranking import before, grouped
from bmoe_lightning.metrics.spec import over_all_examples


def adaptive_calibration_error(log_probs: Tensor, target: Tensor, *, num_bins: int = 15) -> Tensor:
    """Top-label calibration error over bins that each hold 1/B of the examples, by confidence.

    Every bin has exactly the same mass: an example at an edge is split between two bins, and examples of equal
    confidence count with their mean. So the result does not depend on their order. Where N is a multiple of B and
    confidences differ, the bins are the B parts of the sorted examples.

    Args:
        log_probs: Normalised natural log-probabilities, `[N, K]`.
        target: Class indices, `[N]`.
        num_bins: Number of bins B.

    Returns:
        A float64 scalar in [0, 1].

    Raises:
        TypeError: If a tensor has the wrong dtype; see `check_predictions`.
        ValueError: If the predictions are refused, see `check_predictions`, or `num_bins` is below 1.
    """
    return once(_weighted(Binning(num_bins).num_bins), *check_predictions(log_probs, target))


class AdaptiveCalibrationError(OverAllExamples):
    """Top-label calibration error over bins of equal mass; the class of `adaptive_calibration_error`.

    Args:
        num_bins: Number of bins.
        kwargs: Passed on to `torchmetrics.Metric`.

    Raises:
        ValueError: If `num_bins` is below 1.
    """

    higher_is_better = False
    prefix = "adaptive_ece"

    def __init__(self, num_bins: int = 15, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_bins = Binning(num_bins).num_bins

    def weighted(self, log_probs: Tensor, target: Tensor) -> WeightedValue:
        """The error as a function of multiplicities; see `OverAllExamples`."""
        return _weighted(self.num_bins)(log_probs, target)


def _weighted(num_bins: int) -> Callable[[Tensor, Tensor], WeightedValue]:
    def weighted(log_probs: Tensor, target: Tensor) -> WeightedValue:
        confidence, correct = top_label(log_probs, target)
        groups = grouped(confidence)
        shares = torch.arange(num_bins + 1, dtype=torch.float64, device=confidence.device) / num_bins

        def value(weights: Tensor) -> Tensor:
            size, gap = groups.sums(weights), groups.sums(weights * (correct - confidence))
            number = size.sum(1, keepdim=True)
            # The gap summed over the least confident examples is linear in their number within a group.
            edges = shares * number
            group = torch.searchsorted(size.cumsum(1), edges).clamp(max=groups.number - 1)
            inside = (edges - before(size).gather(1, group)) / size.gather(1, group).clamp(min=1)
            cumulative = before(gap).gather(1, group) + inside * gap.gather(1, group)
            return cumulative.diff(dim=1).abs().sum(1) / number.squeeze(1)

        return value

    return weighted


SPEC = over_all_examples(
    "adaptive_ece",
    "Adaptive ECE",
    lambda binning: AdaptiveCalibrationError(binning.num_bins),
    definition="mean absolute gap between confidence and accuracy over 15 bins of equal mass, ties averaged",
)
