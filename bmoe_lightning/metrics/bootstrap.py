"""Bootstrap over test examples (Efron 1979, https://doi.org/10.1214/aos/1176344552), vectorised over resamples.

Intervals are *centred* percentile intervals: the percentiles of the resamples, shifted by the difference between the
estimate and the median of the resamples, and clipped to the metric's range. A resample repeats examples, so a metric
that takes an absolute value after averaging (every calibration error) comes out larger on it than on the data. Plain
percentiles add that bias to an estimate that has it once already and may lie above it; shifted ones always contain it.
For means over examples the shift is of the order of rounding. The interval is about the metric *at this number of
examples*, its bias included: an ECE has one, also where the model is calibrated perfectly.
`tests/metrics/test_interval_coverage.py` compares the coverage with that of plain, reflected and bias-corrected
percentiles.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bmoe_lightning.metrics.binning import BinConvention, Binning
from bmoe_lightning.metrics.calibration import HEADLINE_METRICS
from bmoe_lightning.metrics.inputs import check_predictions
from bmoe_lightning.metrics.spec import MetricSpec, Resamples

# Indices drawn at a time: bounds the memory at some tens of MB for any number of examples.
_DRAWS_PER_CHUNK = 4_000_000


@dataclass(frozen=True)
class Interval:
    """A confidence interval, ends included."""

    low: float
    high: float


@dataclass(frozen=True)
class Estimate:
    """A value with its confidence interval, which contains it."""

    value: float
    low: float
    high: float


def calibration_resamples(
    log_probs: Tensor,
    target: Tensor,
    *,
    num_samples: int = 1000,
    seed: int = 0,
    num_bins: int = 15,
    convention: BinConvention = "right",
    metrics: Sequence[MetricSpec] = HEADLINE_METRICS,
) -> dict[str, Tensor]:
    """Metrics on resamples of the examples, each drawn with replacement and as large as the data.

    Calls with the same `seed`, `num_samples` and number of examples draw the same examples, so results for several
    methods or training seeds on one test set are paired.

    Args:
        log_probs: Normalised natural log-probabilities, `[N, K]`.
        target: Class indices, `[N]`.
        num_samples: Number of resamples S.
        seed: Seed of the draws; the global generator is not used.
        num_bins: Number of ECE bins.
        convention: Closed side of the ECE bins.
        metrics: The metrics.

    Returns:
        For each metric, its value on every resample: `[S]` float64 on the CPU.

    Raises:
        TypeError: If a tensor has the wrong dtype; see `check_predictions`.
        ValueError: If the predictions are refused, see `check_predictions`, a setting is not supported, or
            `num_samples` is below 1.
    """
    binning = Binning(num_bins, convention)
    log_probs, target = check_predictions(log_probs.detach().cpu(), target.cpu())
    functions = {metric.name: metric.resampled(log_probs, target, binning) for metric in metrics}
    parts: dict[str, list[Tensor]] = {name: [] for name in functions}
    for resamples in draw_resamples(len(target), num_samples, seed):
        for name, function in functions.items():
            parts[name].append(function(resamples))
    return {name: torch.cat(values) for name, values in parts.items()}


def centred_interval(
    samples: Tensor, estimate: float, level: float = 0.95, *, lower: float = -math.inf, upper: float = math.inf
) -> Interval:
    """Percentile interval of the resamples, shifted so that their median is the estimate; it contains the estimate.

    Percentiles are samples themselves, rounded outwards. Resamples on which the metric is undefined (NaN) are left out.
    Where the estimate or the median is infinite nothing is shifted, and the interval is extended to the estimate.

    Args:
        samples: Values on resamples `[S]`, floating.
        estimate: Value on the data, between `lower` and `upper`.
        level: Coverage, between 0 and 1, exclusive.
        lower: Smallest value that the metric can have.
        upper: Largest value that it can have.

    Returns:
        The interval; both ends NaN if the estimate, or the metric on every resample, is NaN.

    Raises:
        ValueError: If `level` is out of range.
    """
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must lie between 0 and 1, found {level}")
    tail = (1.0 - level) / 2.0
    defined = samples[~samples.isnan()]
    if math.isnan(estimate) or not len(defined):
        return Interval(math.nan, math.nan)
    low = float(torch.quantile(defined, tail, interpolation="lower"))
    high = float(torch.quantile(defined, 1.0 - tail, interpolation="higher"))
    median = float(torch.quantile(defined, 0.5, interpolation="nearest"))
    if not (math.isfinite(median) and math.isfinite(estimate)):
        return Interval(min(low, estimate), max(high, estimate))
    # Clipped to the estimate at most, which may lie outside of the range by a rounding error.
    return Interval(
        min(max(estimate + (low - median), lower), estimate), max(min(estimate + (high - median), upper), estimate)
    )


def draw_resamples(
    num_examples: int, num_samples: int, seed: int, draws_per_chunk: int = _DRAWS_PER_CHUNK
) -> Iterator[Resamples]:
    """Yield resamples drawn with replacement, in chunks, `num_samples` in total.

    Args:
        num_examples: Number of examples N, also of each resample.
        num_samples: Number of resamples.
        seed: Seed of the draws; the global generator is not used.
        draws_per_chunk: Maximum number of indices in a chunk, to bound the memory; a single resample may have more.

    Raises:
        ValueError: If `num_samples` is below 1.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, found {num_samples}")
    generator = torch.Generator().manual_seed(seed)
    chunk = max(1, draws_per_chunk // num_examples)
    for start in range(0, num_samples, chunk):
        rows = min(chunk, num_samples - start)
        yield Resamples(torch.randint(num_examples, (rows, num_examples), generator=generator))
