"""Variance of the log-probability of whole texts under a posterior: a problem of two classes for each text.

With class logits `(log p(y | x), 0)` the one contrast is the log-probability itself, so that one backward pass gives
its variance under the linearised model, whatever the number of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


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


def contrast_variance(covariance: Tensor) -> Tensor:
    """Variance of the difference of two class logits, `[B]`, from their covariance `[B, 2, 2]`, centred or not."""
    return covariance[:, 0, 0] + covariance[:, 1, 1] - 2 * covariance[:, 0, 1]
