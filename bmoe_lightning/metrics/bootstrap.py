"""Percentile bootstrap over test examples (Efron 1979) for the four headline metrics, without a loop over resamples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from bmoe_lightning.metrics.functional import (
    BinConvention,
    bin_index,
    bin_totals,
    calibration_error_from_totals,
    check_binning,
    check_predictions,
    example_brier,
    example_nll,
    top_label,
)

MetricName = Literal["acc", "ece", "nll", "brier"]
METRIC_NAMES: tuple[MetricName, ...] = get_args(MetricName)

# Indices drawn at a time: bounds the memory at some tens of MB for any number of examples.
_DRAWS_PER_CHUNK = 4_000_000


@dataclass(frozen=True)
class Interval:
    """A confidence interval, ends included."""

    low: float
    high: float


@dataclass(frozen=True)
class Estimate:
    """A value with its confidence interval."""

    value: float
    low: float
    high: float


def calibration_values(
    log_probs: Tensor, target: Tensor, *, num_bins: int = 15, convention: BinConvention = "right"
) -> dict[MetricName, float]:
    """Accuracy, ECE, NLL (nats) and Brier score in one pass.

    Args:
        log_probs: ``[N, K]``, normalised natural log-probabilities.
        target: ``[N]``, class indices.
        num_bins: Number of ECE bins.
        convention: Closed side of the ECE bins.

    Raises:
        TypeError: See :func:`~bmoe_lightning.metrics.functional.check_predictions`.
        ValueError: See :func:`~bmoe_lightning.metrics.functional.check_predictions`.
    """
    check_binning(num_bins, convention)
    log_probs, target = check_predictions(log_probs, target)
    return {
        "acc": float(top_label(log_probs, target)[1].mean()),
        "ece": float(calibration_error_from_totals(bin_totals(log_probs, target, num_bins, convention))),
        "nll": float(example_nll(log_probs, target).mean()),
        "brier": float(example_brier(log_probs, target).mean()),
    }


def calibration_resamples(
    log_probs: Tensor,
    target: Tensor,
    *,
    num_samples: int = 1000,
    seed: int = 0,
    num_bins: int = 15,
    convention: BinConvention = "right",
) -> dict[MetricName, Tensor]:
    """The four metrics on resamples of the examples, each drawn with replacement and as large as the data.

    Calls with the same ``seed``, ``num_samples`` and number of examples draw the same examples, so results for several
    methods or training seeds on one test set are paired.

    Args:
        log_probs: ``[N, K]``, normalised natural log-probabilities.
        target: ``[N]``, class indices.
        num_samples: Number of resamples S.
        seed: Seed of the own generator; the global one is left alone.
        num_bins: Number of ECE bins B.
        convention: Closed side of the ECE bins.

    Returns:
        For each metric, its value on every resample: ``[S]`` float64 on the CPU.

    Raises:
        TypeError: See :func:`~bmoe_lightning.metrics.functional.check_predictions`.
        ValueError: See there, or if ``num_samples`` is below 1.
    """
    check_binning(num_bins, convention)
    log_probs, target = check_predictions(log_probs.detach().cpu(), target.cpu())
    confidence, correct = top_label(log_probs, target)
    losses = example_nll(log_probs, target)
    squared = example_brier(log_probs, target)
    # The ECE of a resample is sum_b |sum of (correct - confidence) over its examples in bin b| / N.
    gaps = torch.zeros(len(target), num_bins, dtype=torch.float64)
    gaps.scatter_(1, bin_index(confidence, num_bins, convention)[:, None], (correct - confidence)[:, None])
    parts: dict[MetricName, list[Tensor]] = {name: [] for name in METRIC_NAMES}
    for indices in _resamples(len(target), num_samples, seed):
        times_drawn = torch.zeros(indices.shape, dtype=torch.float64)
        times_drawn.scatter_add_(1, indices, torch.ones((), dtype=torch.float64).expand(indices.shape))
        parts["acc"].append(correct[indices].mean(dim=1))
        parts["ece"].append((times_drawn @ gaps).abs().sum(dim=1) / len(target))
        # Gathered, not weighted by the counts: an infinite loss that was not drawn must not become 0 * inf.
        parts["nll"].append(losses[indices].mean(dim=1))
        parts["brier"].append(squared[indices].mean(dim=1))
    return {name: torch.cat(values) for name, values in parts.items()}


def percentile_interval(samples: Tensor, level: float = 0.95) -> Interval:
    """Central interval that holds ``level`` of the samples.

    The ends are samples themselves, rounded outwards, so that infinite values give infinite ends and not NaN.

    Args:
        samples: ``[S]`` floating.
        level: Between 0 and 1, exclusive.

    Raises:
        ValueError: If ``level`` is out of range.
    """
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must lie between 0 and 1, found {level}.")
    tail = (1.0 - level) / 2.0
    low = torch.quantile(samples, tail, interpolation="lower")
    high = torch.quantile(samples, 1.0 - tail, interpolation="higher")
    return Interval(float(low), float(high))


def bootstrap_interval(
    statistic: MetricName | Callable[[Tensor, Tensor], Tensor | float],
    log_probs: Tensor,
    target: Tensor,
    *,
    num_samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of a statistic over examples.

    Resampling adds noise to every bin, which an absolute value cannot cancel: for the ECE of a well calibrated model
    the whole interval may lie above the estimate.

    Args:
        statistic: ``"acc"``, ``"ece"``, ``"nll"`` or ``"brier"``, computed for all resamples at once (ECE with its
            defaults); or any function of ``(log_probs [N, K], target [N])``, called once a resample.
        log_probs: ``[N, K]``, normalised natural log-probabilities.
        target: ``[N]``, class indices.
        num_samples: Number of resamples.
        level: Coverage of the interval.
        seed: Seed of the own generator; the global one is left alone.

    Raises:
        TypeError: See :func:`~bmoe_lightning.metrics.functional.check_predictions`.
        ValueError: If the name is unknown, ``num_samples`` or ``level`` is out of range, or the predictions are
            refused.
    """
    if isinstance(statistic, str):
        if statistic not in METRIC_NAMES:
            raise ValueError(f"statistic must be one of {METRIC_NAMES} or a function, found {statistic!r}.")
        samples = calibration_resamples(log_probs, target, num_samples=num_samples, seed=seed)[statistic]
        return percentile_interval(samples, level)
    check_predictions(log_probs, target)
    values = [
        float(statistic(log_probs[row], target[row]))
        for indices in _resamples(len(target), num_samples, seed)
        for row in indices.to(target.device)
    ]
    return percentile_interval(torch.tensor(values, dtype=torch.float64), level)


def calibration_summary(
    log_probs: Tensor,
    target: Tensor,
    *,
    num_samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    num_bins: int = 15,
    convention: BinConvention = "right",
) -> dict[MetricName, Estimate]:
    """Accuracy, ECE, NLL (nats) and Brier score, each with a percentile bootstrap interval.

    Args:
        log_probs: ``[N, K]``, normalised natural log-probabilities.
        target: ``[N]``, class indices.
        num_samples: Number of resamples.
        level: Coverage of the intervals.
        seed: Seed of the own generator; the global one is left alone.
        num_bins: Number of ECE bins.
        convention: Closed side of the ECE bins.

    Raises:
        TypeError: See :func:`~bmoe_lightning.metrics.functional.check_predictions`.
        ValueError: See :func:`calibration_resamples` and :func:`percentile_interval`.
    """
    values = calibration_values(log_probs, target, num_bins=num_bins, convention=convention)
    resamples = calibration_resamples(
        log_probs, target, num_samples=num_samples, seed=seed, num_bins=num_bins, convention=convention
    )
    summary: dict[MetricName, Estimate] = {}
    for name in METRIC_NAMES:
        interval = percentile_interval(resamples[name], level)
        summary[name] = Estimate(values[name], interval.low, interval.high)
    return summary


def _resamples(num_examples: int, num_samples: int, seed: int) -> Iterator[Tensor]:
    """Yield ``[chunk, N]`` indices drawn with replacement, ``num_samples`` rows in all."""
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, found {num_samples}.")
    generator = torch.Generator().manual_seed(seed)
    chunk = max(1, _DRAWS_PER_CHUNK // num_examples)
    for start in range(0, num_samples, chunk):
        rows = min(chunk, num_samples - start)
        yield torch.randint(num_examples, (rows, num_examples), generator=generator)
