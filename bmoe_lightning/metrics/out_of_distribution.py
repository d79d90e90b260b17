"""Summaries of uncertainty scores: in- against out-of-distribution inputs, and right against wrong answers.

Scores are higher where a prediction is more uncertain; the positive class is out of distribution, or wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bmoe_lightning.metrics.bootstrap import Estimate, centred_interval, draw_resamples
from bmoe_lightning.metrics.detection import check_scores, detection_values, weighted_detection


def detect_out_of_distribution(
    inside: Tensor, outside: Tensor, *, num_samples: int = 1000, seed: int = 0, level: float = 0.95
) -> dict[str, Estimate]:
    """AUROC, AUPR and FPR95 of out-of-distribution inputs (positive) by a score, with intervals.

    Both data sets are drawn again with replacement, each at its size. AUPR depends on their sizes: a score that knows
    nothing has the share of positives.

    Args:
        inside: Uncertainties of in-distribution inputs, `[N]`.
        outside: Uncertainties of out-of-distribution inputs, `[M]`.
        num_samples: Number of resamples.
        seed: Seed of the resamples; the global generator is not used.
        level: Coverage of the intervals.

    Raises:
        ValueError: If a score is NaN, a data set is empty, or a setting is out of range.
    """
    if inside.dim() != 1 or outside.dim() != 1 or not len(inside) or not len(outside):
        raise ValueError(
            f"expected scores [N] of both data sets, none empty, found {list(inside.shape)} and {list(outside.shape)}"
        )
    score = torch.cat([inside.cpu().double(), outside.cpu().double()])
    positive = torch.arange(len(score)) >= len(inside)

    def draws() -> Iterator[Tensor]:
        chunks = [
            torch.cat([drawn.counts for drawn in draw_resamples(len(part), num_samples, seed + turn)]).split(_CHUNK)
            for turn, part in enumerate((inside, outside))
        ]
        for first, second in zip(*chunks, strict=True):
            yield torch.cat([first, second], 1)

    return _summary(score, positive, draws, level)


def detect_errors(
    score: Tensor, wrong: Tensor, *, num_samples: int = 1000, seed: int = 0, level: float = 0.95
) -> dict[str, Estimate]:
    """AUROC, AUPR and FPR95 of wrong answers (positive) by a score, with intervals.

    Args:
        score: Uncertainties `[N]`.
        wrong: Whether each answer is wrong, `[N]`.
        num_samples: Number of resamples of the examples.
        seed: Seed of the resamples; the global generator is not used.
        level: Coverage of the intervals.

    Returns:
        Estimates by name; NaN where all answers are right or all wrong. Resamples of one kind only are left out.

    Raises:
        ValueError: If shapes differ, a score is NaN, or a setting is out of range.
    """

    def draws() -> Iterator[Tensor]:
        for drawn in draw_resamples(len(score), num_samples, seed):
            yield drawn.counts

    return _summary(*check_scores(score, wrong), draws, level)


_CHUNK = 200


def _summary(
    score: Tensor, positive: Tensor, draws: Callable[[], Iterator[Tensor]], level: float
) -> dict[str, Estimate]:
    estimates = detection_values(score, positive)
    functions = weighted_detection(score, positive)
    parts: dict[str, list[Tensor]] = {name: [] for name in functions}
    for counts in draws():
        for name, function in functions.items():
            parts[name].append(function(counts))
    found = {}
    for name, value in estimates.items():
        interval = centred_interval(torch.cat(parts[name]), value, level, lower=0.0, upper=1.0)
        found[name] = Estimate(value, interval.low, interval.high)
    return found
