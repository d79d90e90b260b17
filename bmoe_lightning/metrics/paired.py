"""Is the difference between two methods real? A bootstrap of the difference of a metric on the same examples."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bmoe_lightning.metrics.binning import BinConvention, Binning
from bmoe_lightning.metrics.bootstrap import Estimate, centred_interval, draw_resamples
from bmoe_lightning.metrics.calibration import get_metric
from bmoe_lightning.metrics.inputs import check_predictions


def paired_difference(
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    targets: Sequence[Tensor],
    metric: str = "nll",
    *,
    same_items: bool = True,
    num_samples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    num_bins: int = 15,
    convention: BinConvention = "right",
) -> Estimate:
    """Metric of the first method less that of the second, mean over training seeds, with an interval.

    Both methods are evaluated on the same resamples. With several training seeds these are clusters: each resample
    draws seeds with replacement too, and then the examples (Owen 2007, https://doi.org/10.1214/07-AOAS122), so the
    interval holds the variation over seeds as well as over examples. Deviations of the seeds from their mean are
    enlarged by sqrt(S / (S - 1)), without which S drawn seeds vary too little. With one seed it is about this training
    run alone. The interval is the centred one of all metrics; where it excludes 0 the difference is real at its level.

    Args:
        first: Log-probabilities `[N, K]` of the first method, one for each training seed.
        second: Those of the second method, in the order of the same seeds.
        targets: Class indices `[N]`, one for each training seed.
        metric: Name of a metric of `METRICS`.
        same_items: Whether all seeds have the same examples in the same order, which are then drawn together; if not,
            each seed has its own, in its own number.
        num_samples: Number of resamples R.
        seed: Seed of the resamples; the global generator is not used.
        level: Coverage of the interval.
        num_bins: Number of ECE bins.
        convention: Closed side of the ECE bins.

    Returns:
        The difference: negative if the first method has the lower value. NaN if it is undefined, as that of two
        infinite NLLs is.

    Raises:
        TypeError: If a tensor has the wrong dtype; see `check_predictions`.
        ValueError: If there are no seeds, numbers of seeds or examples differ, predictions are refused, the metric is
            not known or a setting is out of range.
    """
    spec, binning = get_metric(metric), Binning(num_bins, convention)
    if not targets or not len(first) == len(second) == len(targets):
        raise ValueError(
            f"expected predictions of both methods and targets for each training seed, found {len(first)}, "
            f"{len(second)} and {len(targets)}"
        )
    pairs = [
        tuple(check_predictions(log_probs.detach().cpu(), target.cpu()) for log_probs in methods)
        for *methods, target in zip(first, second, targets, strict=True)
    ]
    if same_items and any(not torch.equal(pair[0][1], pairs[0][0][1]) for pair in pairs):
        raise ValueError("the seeds do not have the same targets; pass same_items=False if their examples differ")
    estimates = [float(spec.value(*one, binning)) - float(spec.value(*two, binning)) for one, two in pairs]
    samples = []
    for turn, (one, two) in enumerate(pairs):
        functions = [spec.resampled(*predictions, binning) for predictions in (one, two)]
        draws = draw_resamples(len(one[1]), num_samples, seed if same_items else seed + turn)
        samples.append(torch.cat([functions[0](drawn) - functions[1](drawn) for drawn in draws]))
    differences = torch.stack(samples, 1)
    width = spec.upper - spec.lower
    estimate = sum(estimates) / len(estimates)
    found = centred_interval(_over_seeds(differences, seed), estimate, level, lower=-width, upper=width)
    return Estimate(estimate, found.low, found.high)


def _over_seeds(differences: Tensor, seed: int) -> Tensor:
    """Means over drawn seeds, `[R]`, of differences `[R, S]`."""
    mean, number = differences.mean(1), differences.shape[1]
    if number == 1:
        return mean
    # Another stream than that of the examples.
    generator = torch.Generator().manual_seed(2**32 + seed)
    drawn = torch.randint(number, differences.shape, generator=generator)
    deviation = differences.gather(1, drawn).mean(1) - mean
    return mean + math.sqrt(number / (number - 1)) * deviation
