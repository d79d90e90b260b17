"""Negative log-likelihood, a proper score (Gneiting and Raftery 2007, https://doi.org/10.1198/016214506000001437)."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from bmoe_lightning.metrics.base import MeanOverExamples
from bmoe_lightning.metrics.inputs import check_predictions
from bmoe_lightning.metrics.spec import mean_over_examples


def negative_log_likelihood(log_probs: Tensor, target: Tensor) -> Tensor:
    """Mean negative log-likelihood in nats.

    An example that gives its target probability zero makes the result infinite, with a warning.

    Args:
        log_probs: Normalised natural log-probabilities, `[N, K]`.
        target: Class indices, `[N]`.

    Returns:
        A float64 scalar.

    Raises:
        TypeError: If a tensor has the wrong dtype; see `check_predictions`.
        ValueError: If the predictions are refused; see `check_predictions`.
    """
    return NegativeLogLikelihood.per_example(*check_predictions(log_probs, target)).mean()


class NegativeLogLikelihood(MeanOverExamples):
    """Mean negative log-likelihood in nats; the torchmetrics class of `negative_log_likelihood`."""

    is_differentiable = True
    higher_is_better = False
    prefix = "nll"

    nll_sum: Tensor
    nll_count: Tensor

    @staticmethod
    def per_example(log_probs: Tensor, target: Tensor) -> Tensor:
        """Negative log-probability of each target in nats, `[N]`; warns where it is infinite.

        Args:
            log_probs: Log-probabilities `[N, K]`, checked.
            target: Class indices `[N]`, checked.
        """
        losses = -log_probs.gather(1, target[:, None]).squeeze(1)
        infinite = int(torch.isinf(losses).sum())
        if infinite:
            warnings.warn(
                f"{infinite} of {len(losses)} examples give their target probability zero, so the NLL is infinite; "
                "either the target is a class the example does not have, or its probability underflowed",
                stacklevel=2,
            )
        return losses


SPEC = mean_over_examples(
    "nll",
    "NLL",
    NegativeLogLikelihood,
    definition="mean of -log p(label), in nats; infinite if a label has probability zero",
    upper=math.inf,
    note="NLL in nats.",
)
