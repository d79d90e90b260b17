"""Scores of uncertainty that a posterior gives beyond its probabilities; higher is more uncertain."""

from __future__ import annotations

from torch import Tensor

from bmoe_lightning.curvature.spec import Curvature
from bmoe_lightning.laplace.uncertainty_scores import uncertainty_scores
from bmoe_lightning.methods.batch_view import BatchView

# The entropy of a sample lies in [0, log K], so the mean over a thousand has a standard error of at most log K / 63.
_NUM_SAMPLES = 1000
_OF_PROBABILITIES = ("max_probability", "entropy")


def posterior_uncertainty(batch: BatchView, curvature: Curvature, prior_precision: Tensor) -> dict[str, Tensor]:
    """Mutual information, logit variance and variance over the prior's, see `uncertainty_scores`: each `[B]`.

    Args:
        batch: View of the batch.
        curvature: Curvature of the posterior.
        prior_precision: Prior precision `[L]`, one value per layer.
    """
    logits, covariance = batch.covariance(curvature, prior_precision)
    scores = uncertainty_scores(
        logits,
        covariance,
        batch.prior_covariance(curvature, prior_precision),
        num_samples=_NUM_SAMPLES,
        seed=batch.seed,
    )
    return {name: score for name, score in scores.items() if name not in _OF_PROBABILITIES}
