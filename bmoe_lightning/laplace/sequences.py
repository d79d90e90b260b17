"""Variance of the log-probability of whole texts under a posterior: a problem of two classes for each text.

With class logits `(log p(y | x), 0)` the one contrast is the log-probability itself, so that one backward pass gives
its variance under the linearised model, whatever the number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bmoe_lightning.experts.logits_contract import ClassLogits

SequenceLogProb = Callable[[Any, Any], Tensor]
"""Function `(model, batch) -> log p(y | x) [B]`, with graph."""


@dataclass(frozen=True)
class SequenceVariance:
    """The log-probability of texts under a posterior over weights; **a larger variance is more uncertain**.

    Attributes:
        log_prob: `log p(y | x)` at the mean of the posterior, which is the mean under the linearised model, `[B]`.
        variance: Its variance under the posterior, `[B]` float64.
        isotropic: The same with covariance 1 of every weight in place of the posterior's: the squared norm of the
            gradient, `[B]` float64. It shows what the curvature adds.
    """

    log_prob: Tensor
    variance: Tensor
    isotropic: Tensor

    @property
    def standard_deviation(self) -> Tensor:
        """Standard deviation of the log-probability, `[B]`, in nats."""
        return self.variance.sqrt()


def two_classes(log_prob: SequenceLogProb, found: list[Tensor]) -> ClassLogits:
    """Class logits `[B, 2]` whose contrast has the gradient of the log-probability, and the value 0.

    Log-probabilities of long texts are thousands below zero, and a class that far below another one is read as absent.

    Args:
        log_prob: The function.
        found: List to which its result is appended, detached.
    """

    def class_logits(model: Any, batch: Any) -> tuple[Tensor, None]:
        value = log_prob(model, batch)
        if not isinstance(value, Tensor) or value.dim() != 1 or not value.is_floating_point():
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"sequence_log_prob must return log-probabilities [B], one for each text, got {shape}")
        found.append(value.detach())
        moved = value - value.detach()
        return torch.stack([moved, torch.zeros_like(moved)], 1), None

    return class_logits


def contrast_variance(covariance: Tensor) -> Tensor:
    """Variance of the difference of two class logits, `[B]`, from their covariance `[B, 2, 2]`, centred or not."""
    return covariance[:, 0, 0] + covariance[:, 1, 1] - 2 * covariance[:, 0, 1]
