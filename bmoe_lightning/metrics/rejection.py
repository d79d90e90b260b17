"""Prediction rejection ratio (PRR): how much better the answers get that are kept, as the most uncertain are rejected.

As lm-polygraph computes it for texts (https://github.com/IINemo/lm-polygraph): the mean quality of the k most certain
answers, averaged over k, less that of a random order, relative to that of the best order. 1 is the best order, 0 a
random one, negative a worse one. The random order's value is its expectation, the mean quality, and answers of equal
uncertainty count with their mean quality, so the ratio depends on no draw and no order of the data. Quality is any
number that is higher for a better answer, such as 1 and 0 for right and wrong.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bmoe_lightning.metrics.base import WeightedValue
from bmoe_lightning.metrics.bootstrap import Estimate, centred_interval, draw_resamples
from bmoe_lightning.metrics.ranking import Groups, before, grouped

# Keeps a product such as 0.07 * 100 = 7.000000000000001 from rejecting one more.
_ROUNDING = 1e-9


def prediction_rejection_ratio(score: Tensor, quality: Tensor, *, max_rejection: float = 1.0) -> float:
    """The ratio of one data set.

    Args:
        score: Uncertainties `[N]`, higher is more uncertain.
        quality: Qualities of the answers `[N]`, finite, higher is better.
        max_rejection: Largest share that is rejected, in (0, 1].

    Returns:
        The ratio, at most 1; NaN if all qualities are equal, or at most one answer is rejected.

    Raises:
        ValueError: If shapes differ, there are no answers, a score is NaN, a quality is not finite, or `max_rejection`
            is out of range.
    """
    score, quality = _checked(score, quality, max_rejection)
    return float(_ratios(score, quality, torch.ones(1, len(score), dtype=torch.float64), max_rejection)[0])


def rejection_ratio_interval(
    score: Tensor,
    quality: Tensor,
    *,
    max_rejection: float = 1.0,
    num_samples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Estimate:
    """The ratio of one data set, with its interval by resamples of the answers; see `prediction_rejection_ratio`.

    Args:
        score: Uncertainties `[N]`.
        quality: Qualities `[N]`.
        max_rejection: Largest share that is rejected.
        num_samples: Number of resamples. Those whose qualities are all equal are left out.
        seed: Seed of the resamples; the global generator is not used.
        level: Coverage of the interval.

    Raises:
        ValueError: As `prediction_rejection_ratio`, or if a setting is out of range.
    """
    score, quality = _checked(score, quality, max_rejection)
    value = prediction_rejection_ratio(score, quality, max_rejection=max_rejection)
    resamples = draw_resamples(len(score), num_samples, seed)
    found = torch.cat([_ratios(score, quality, drawn.counts, max_rejection) for drawn in resamples])
    interval = centred_interval(found, value, level, upper=1.0)
    return Estimate(value, interval.low, interval.high)


def weighted_rejection_ratio(score: Tensor, quality: Tensor, *, max_rejection: float = 1.0) -> WeightedValue:
    """The ratio as a function of multiplicities `[R, N]` of the answers, for resamples; see the function above.

    Args:
        score: Uncertainties `[N]`.
        quality: Qualities `[N]`.
        max_rejection: Largest share that is rejected.

    Raises:
        ValueError: As `prediction_rejection_ratio`.
    """
    score, quality = _checked(score, quality, max_rejection)
    return lambda weights: _ratios(score, quality, weights, max_rejection)


def _checked(score: Tensor, quality: Tensor, max_rejection: float) -> tuple[Tensor, Tensor]:
    if score.dim() != 1 or score.shape != quality.shape or not len(score):
        raise ValueError(
            f"expected scores [N] and qualities [N] with N at least 1, found {list(score.shape)} and "
            f"{list(quality.shape)}"
        )
    score, quality = score.detach().cpu().double(), quality.detach().cpu().double()
    if bool(score.isnan().any()) or not bool(quality.isfinite().all()):
        raise ValueError("scores must not be NaN, and qualities must be finite; check the predictions")
    if not 0.0 < max_rejection <= 1.0:
        raise ValueError(f"max_rejection must lie in (0, 1], found {max_rejection}")
    return score, quality


def _ratios(score: Tensor, quality: Tensor, weights: Tensor, max_rejection: float) -> Tensor:
    """Ratios `[R]` under multiplicities `[R, N]` that have one sum."""
    total = int(weights[0].sum())
    kept = total - max(1, math.floor(max_rejection * total + _ROUNDING))  # of these no mean is taken
    found, best = (_area(groups, weights, quality, total, kept) for groups in (grouped(score), grouped(-quality)))
    random = weights @ quality / total
    spread = best - random
    # Rounding of qualities that are all equal is no spread.
    same = spread <= 1e-12 * quality.abs().max()
    return torch.where(same, math.nan, (found - random) / spread.masked_fill(same, 1))


def _area(groups: Groups, weights: Tensor, quality: Tensor, total: int, kept: int) -> Tensor:
    """Mean over k = `kept` + 1 ... `total` of the mean quality of the first k answers, `[R]`.

    In a group of size w with mean quality q, after n answers whose qualities sum to Q, the means are
    `(Q + j q) / (n + j)`, j = 1 ... w; their sum from j = a + 1 is `(w - a) q + (Q - n q) (H(n + w) - H(n + a))` with
    the harmonic numbers H.
    """
    size, sums = groups.sums(weights), groups.sums(weights * quality)
    reciprocals = 1 / torch.arange(1, total + 1, dtype=torch.float64)
    harmonic = torch.cat([reciprocals.new_zeros(1), reciprocals.cumsum(0)])
    answered, earlier, mean = before(size), before(sums), sums / size.clamp(min=1)
    skipped = (kept - answered).clamp(min=0).minimum(size)
    steps = harmonic[(answered + size).long()] - harmonic[(answered + skipped).long()]
    return ((size - skipped) * mean + (earlier - answered * mean) * steps).sum(1) / (total - kept)
