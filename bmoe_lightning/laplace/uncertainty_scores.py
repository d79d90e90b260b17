"""Scores of how uncertain a prediction is, from the Gaussian over its logits; **higher is more uncertain**.

The direction of each score is fixed here and never found from data. `bmoe_lightning.metrics.detect_out_of_distribution`
and `detect_errors` say what a score detects. All take `logits [B, K]` (`-inf` for absent classes) and the covariance
`[B, K, K]` of the logits (zero rows and columns for absent classes), or log-probabilities `[B, K]`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bmoe_lightning.laplace.predictive import NUM_SAMPLES, entropy, mean_variance, predict_with_uncertainty

# Variance of a few roundings of float32, relative to the square of what is rounded.
_FLOAT32_ROUNDING = (4 * torch.finfo(torch.float32).eps) ** 2


def one_minus_max_probability(log_probs: Tensor) -> Tensor:
    """One less the largest probability, `[B]` in [0, 1): maximum softmax probability, turned round.

    Hendrycks and Gimpel 2017 (https://arxiv.org/abs/1610.02136).

    Args:
        log_probs: Log-probabilities `[B, K]`.
    """
    # expm1 tells probabilities apart that round to 1.
    return (-torch.expm1(log_probs.amax(1))).clamp(min=0)


def relative_variance(logits: Tensor, covariance: Tensor, prior_covariance: Tensor) -> Tensor:
    """Mean variance of the centred logits over that under the prior, `[B]`: the share of it that data did not remove.

    Unlike the variance it does not grow with the gradients of the logits. In [0, 1] if the posterior has no direction
    with more variance than the prior; 0 where the prior has no variance but that of rounding, since no weight matters
    there. Rounding of gradients in float32 alone gives logits that only move together that variance when centred.

    Args:
        logits: Logits `[B, K]`.
        covariance: Covariance `[B, K, K]` under the posterior.
        prior_covariance: Covariance `[B, K, K]` under the prior.
    """
    prior = mean_variance(logits, prior_covariance)
    share = max(_FLOAT32_ROUNDING, logits.shape[1] * torch.finfo(prior_covariance.dtype).eps)
    rounding = share * prior_covariance.diagonal(dim1=1, dim2=2).amax(1)
    return torch.where(prior > rounding, mean_variance(logits, covariance) / prior, 0)


def uncertainty_scores(
    logits: Tensor,
    covariance: Tensor,
    prior_covariance: Tensor | None = None,
    *,
    num_samples: int = NUM_SAMPLES,
    seed: int = 0,
) -> dict[str, Tensor]:
    """All scores of a batch by name, each `[B]`, from the same Monte Carlo samples.

    `max_probability` (one less it) and `entropy` are of the averaged probabilities (link `mc`), `mutual_information` is
    that between label and weights in nats (Houlsby et al. 2011, https://arxiv.org/abs/1112.5745), `logit_variance` the
    mean variance of the centred logits, and `relative_variance`, if the prior's covariance is given, that over the
    prior's.

    Args:
        logits: Logits `[B, K]`.
        covariance: Covariance `[B, K, K]` of the logits under the posterior.
        prior_covariance: Covariance `[B, K, K]` under the prior.
        num_samples: Number of Monte Carlo samples.
        seed: Seed of the noise.

    Raises:
        ValueError: If a value is not finite or a covariance is not positive semi-definite.
    """
    found = predict_with_uncertainty(logits, covariance, num_samples=num_samples, seed=seed)
    scores = {
        "max_probability": one_minus_max_probability(found.log_probs),
        "entropy": entropy(found.log_probs),
        "mutual_information": found.mutual_information,
        "logit_variance": mean_variance(logits, covariance),
    }
    if prior_covariance is not None:
        scores["relative_variance"] = relative_variance(logits, covariance, prior_covariance)
    return scores
