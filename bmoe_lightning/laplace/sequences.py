"""Variance of the log-probability of whole texts under a posterior: a problem of two classes for each text.

With class logits `(log p(y | x), 0)` the one contrast is the log-probability itself, so that one backward pass gives
its variance under the linearised model, whatever the number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bmoe_lightning.curvature.texts import SequenceLogProb, contrast_logits
from bmoe_lightning.experts.fsdp import runs_in_lockstep
from bmoe_lightning.laplace.covariance import prior_covariance
from bmoe_lightning.utils.distributed import failing_together

if TYPE_CHECKING:
    from bmoe_lightning.laplace.posterior import LaplacePosterior


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


def text_variance(
    posterior: LaplacePosterior,
    model: nn.Module,
    sequence_log_prob: SequenceLogProb,
    keep: Callable[[Tensor], Tensor],
    batch: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """The variance of texts, and what else is known of them; errors as of `LaplacePosterior.sequence_variance`.

    Args:
        posterior: The posterior.
        model: Model that its curvature was collected on.
        sequence_log_prob: Function `(model, batch) -> log p(y | x) [B]`.
        keep: Function of what that returned, called at once; it returns what is kept of each text, `[B, ...]`.
        batch: Batch that the function accepts.

    Returns:
        What is kept, the variance `[B]` float64, and that under a covariance of 1 for every weight.
    """
    with failing_together(distributed=runs_in_lockstep(model)):
        terms = posterior.batch_terms(model, contrast_logits(sequence_log_prob, keep=keep), batch)
    assert terms.labels is not None
    isotropic = contrast_variance(prior_covariance(terms, torch.ones_like(posterior.prior_precision)))
    return terms.labels, contrast_variance(posterior.covariance_of(terms)), isotropic
