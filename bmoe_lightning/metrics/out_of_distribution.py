"""Summaries of uncertainty scores: in- against out-of-distribution inputs, and right against wrong answers.

Scores are higher where a prediction is more uncertain; the positive class is out of distribution, or wrong.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from bmoe_lightning.metrics.bootstrap import Estimate, centred_interval, draw_resamples
from bmoe_lightning.metrics.detection import check_scores, detection_values, weighted_detection


def detect_out_of_distribution(
    inside: Tensor, outside: Tensor, *, num_samples: int = 1000, seed: int = 0, level: float = 0.95
) -> dict[str, Estimate]:
    """AUROC, AUPR and FPR95 of out-of-distribution inputs (positive) by a score, with intervals.

    Both data sets are drawn again with replacement, each at its size. AUPR depends on their sizes: a score that knows
    nothing has the share of positives. The values of several models, such as those of several seeds, are averaged; the
    interval of the mean is over inputs and not over models.

    Args:
        inside: Uncertainties of in-distribution inputs, `[N]`, or `[S, N]` of several models.
        outside: Uncertainties of out-of-distribution inputs, `[M]` or `[S, M]` likewise.
        num_samples: Number of resamples.
        seed: Seed of the resamples; the global generator is not used.
        level: Coverage of the intervals.

    Raises:
        ValueError: If a score is NaN, a data set is empty, or a setting is out of range.
    """
    same_models = inside.dim() == outside.dim() in (1, 2) and inside.shape[:-1] == outside.shape[:-1]
    if not same_models or not inside.numel() or not outside.numel():
        raise ValueError(
            "expected scores [N] of both data sets, or [S, N] of as many models, none empty, found "
            f"{list(inside.shape)} and {list(outside.shape)}"
        )
    number = inside.shape[-1]
    scores = torch.cat([inside.cpu().double(), outside.cpu().double()], -1)
    positive = torch.arange(scores.shape[-1]) >= number

    def draws() -> Iterator[Tensor]:
        chunks = [
            torch.cat([drawn.counts for drawn in draw_resamples(size, num_samples, seed + turn)]).split(_CHUNK)
            for turn, size in enumerate((number, outside.shape[-1]))
        ]
        for first, second in zip(*chunks, strict=True):
            yield torch.cat([first, second], 1)

    return _summary(list(scores.view(-1, scores.shape[-1])), positive, draws, level)


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

    checked, positive = check_scores(score, wrong)
    return _summary([checked], positive, draws, level)


_CHUNK = 200


def _summary(
    scores: Sequence[Tensor], positive: Tensor, draws: Callable[[], Iterator[Tensor]], level: float
) -> dict[str, Estimate]:
    """Means over models of the values, whose scores are `[N]` each."""
    values = [detection_values(score, positive) for score in scores]
    functions = [weighted_detection(score, positive) for score in scores]
    parts: dict[str, list[Tensor]] = {name: [] for name in functions[0]}
    for counts in draws():
        for name, of_resamples in parts.items():
            of_resamples.append(torch.stack([of_model[name](counts) for of_model in functions]).mean(0))
    found = {}
    for name, of_resamples in parts.items():
        value = statistics.fmean(of_model[name] for of_model in values)
        interval = centred_interval(torch.cat(of_resamples), value, level, lower=0.0, upper=1.0)
        found[name] = Estimate(value, interval.low, interval.high)
    return found
