"""Accuracy."""

from __future__ import annotations

from torch import Tensor

from bmoe_lightning.metrics.base import MeanOverExamples
from bmoe_lightning.metrics.inputs import check_predictions, top_label
from bmoe_lightning.metrics.spec import mean_over_examples


def accuracy(log_probs: Tensor, target: Tensor) -> Tensor:
    """Fraction of examples whose most probable class is the target.

    Args:
        log_probs: Normalised natural log-probabilities, `[N, K]`.
        target: Class indices, `[N]`.

    Returns:
        A float64 scalar in [0, 1].

    Raises:
        TypeError: If a tensor has the wrong dtype; see `check_predictions`.
        ValueError: If the predictions are refused; see `check_predictions`.
    """
    return top_label(*check_predictions(log_probs, target))[1].mean()


class Accuracy(MeanOverExamples):
    """Fraction of examples whose most probable class is the target; the torchmetrics class of `accuracy`."""

    is_differentiable = False
    higher_is_better = True
    plot_upper_bound = 1.0
    prefix = "accuracy"

    accuracy_sum: Tensor
    accuracy_count: Tensor

    @staticmethod
    def per_example(log_probs: Tensor, target: Tensor) -> Tensor:
        """1 where the most probable class is the target, else 0, `[N]`.

        Args:
            log_probs: Log-probabilities `[N, K]`, checked.
            target: Class indices `[N]`, checked.
        """
        return top_label(log_probs, target)[1]


SPEC = mean_over_examples(
    "acc",
    "ACC",
    Accuracy,
    definition="share of examples whose most probable class is the label; ties go to the first class",
    upper=1.0,
)
