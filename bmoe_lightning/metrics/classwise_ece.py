"""Calibration error of every class's probability.

Kull et al. 2019 (https://arxiv.org/abs/1910.12656); static calibration error of Nixon et al. 2019
(https://arxiv.org/abs/1904.01685).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bmoe_lightning.metrics.base import OverAllExamples, WeightedValue, once
from bmoe_lightning.metrics.binning import BinConvention, Binning, bin_index
from bmoe_lightning.metrics.inputs import check_predictions
from bmoe_lightning.metrics.spec import over_all_examples


def classwise_calibration_error(
    log_probs: Tensor, target: Tensor, *, num_bins: int = 15, convention: BinConvention = "right"
) -> Tensor:
    """Mean over the classes of the calibration error of "the label is this class".

    Each class is weighted by the number of examples that have it, so that a class which few examples have counts
    little, and one that no example has not at all; without absent classes it is the plain mean. For multiple choice,
    the class is the position of the answer.

    Args:
        log_probs: Normalised natural log-probabilities, `[N, K]`; `-inf` for absent classes.
        target: Class indices, `[N]`.
        num_bins: Number of equal-width bins of each class's probability.
        convention: Closed side of the bins.

    Returns:
        A float64 scalar in [0, 1].

    Raises:
        TypeError: If a tensor has the wrong dtype; see `check_predictions`.
        ValueError: If the predictions are refused, see `check_predictions`, or a setting is not supported.
    """
    return once(_weighted(Binning(num_bins, convention)), *check_predictions(log_probs, target))


class ClasswiseCalibrationError(OverAllExamples):
    """Mean over the classes of one-against-rest calibration errors; the class of `classwise_calibration_error`.

    Args:
        num_bins: Number of equal-width bins of each class's probability.
        convention: Closed side of the bins.
        kwargs: Passed on to `torchmetrics.Metric`.

    Raises:
        ValueError: If a setting is not supported.
    """

    higher_is_better = False
    prefix = "classwise_ece"

    def __init__(self, num_bins: int = 15, convention: BinConvention = "right", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.binning = Binning(num_bins, convention)

    def weighted(self, log_probs: Tensor, target: Tensor) -> WeightedValue:
        """The error as a function of multiplicities; see `OverAllExamples`."""
        return _weighted(self.binning)(log_probs, target)


def _weighted(binning: Binning) -> Callable[[Tensor, Tensor], WeightedValue]:
    def weighted(log_probs: Tensor, target: Tensor) -> WeightedValue:
        num_classes = log_probs.shape[1]
        is_label = torch.nn.functional.one_hot(target, num_classes).double()
        present = ((log_probs != -torch.inf) | (is_label > 0)).double()
        probabilities = log_probs.exp().clamp(max=1.0)
        first = binning.num_bins * torch.arange(num_classes, device=log_probs.device)
        index = first + bin_index(probabilities, binning)
        gaps = log_probs.new_zeros(len(target), num_classes * binning.num_bins)
        gaps.scatter_(1, index, present * (is_label - probabilities))
        counts = present.sum(1)
        return lambda weights: (weights @ gaps).abs().sum(1) / (weights @ counts)

    return weighted


SPEC = over_all_examples(
    "classwise_ece",
    "Classwise ECE",
    lambda binning: ClasswiseCalibrationError(binning.num_bins, binning.convention),
    definition="mean over the classes, weighted by the examples that have them, of the ECE (15 equal-width bins "
    "(lo, hi]) of each class's probability",
)
