"""Brier score (Brier 1950, https://doi.org/10.1175/1520-0493(1950)078<0001:VOFEIT>2.0.CO;2), summed over classes."""

from __future__ import annotations

import torch
from torch import Tensor

from bmoe_lightning.metrics.base import MeanOverExamples
from bmoe_lightning.metrics.inputs import check_predictions
from bmoe_lightning.metrics.spec import mean_over_examples


def brier_score(log_probs: Tensor, target: Tensor) -> Tensor:
    """Mean over examples of the squared error summed over classes: 0 is perfect, 2 the worst.

    Args:
        log_probs: Normalised natural log-probabilities, `[N, K]`.
        target: Class indices, `[N]`.

    Returns:
        A float64 scalar in [0, 2].

    Raises:
        TypeError: If a tensor has the wrong dtype; see `check_predictions`.
        ValueError: If the predictions are refused; see `check_predictions`.
    """
    return BrierScore.per_example(*check_predictions(log_probs, target)).mean()


class BrierScore(MeanOverExamples):
    """Mean squared error of the probabilities, summed over classes; the torchmetrics class of `brier_score`."""

    is_differentiable = True
    higher_is_better = False
    plot_upper_bound = 2.0
    prefix = "brier"

    brier_sum: Tensor
    brier_count: Tensor

    @staticmethod
    def per_example(log_probs: Tensor, target: Tensor) -> Tensor:
        """Squared error of each example's probabilities, summed over classes, `[N]` in [0, 2].

        Args:
            log_probs: Log-probabilities `[N, K]`, checked.
            target: Class indices `[N]`, checked.
        """
        probabilities = log_probs.exp()
        truth = torch.zeros_like(probabilities).scatter_(1, target[:, None], 1.0)
        return (probabilities - truth).square().sum(dim=1)


SPEC = mean_over_examples(
    "brier",
    "Brier",
    BrierScore,
    definition="squared error of the probabilities, summed over the classes, mean over examples",
    upper=2.0,
)
