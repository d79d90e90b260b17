"""The difference between two methods: a paired bootstrap over test items and over training seeds.

Items and seeds are crossed, since every seed answers the same items, so both are drawn with replacement, each on its
own (the pigeonhole bootstrap, Owen 2007, https://doi.org/10.1214/07-AOAS122). A seed stands for all that it determines,
such as a pre-training. The interval is about new items *and* new seeds, and two methods share both.

A few seeds resampled are too much alike: their mean varies by `(S - 1) / S` of what it should, and five draws have no
tails. So draws of seeds are spread by `sqrt(S / (S - 1))` around their mean, and the interval is widened from the
normal distribution to Student's t, with Satterthwaite's degrees of freedom for the sum of both variances
(https://doi.org/10.2307/3002019). `tests/report/test_differences.py` measures the coverage.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bmoe_lightning.metrics import MetricSpec, Resamples, centred_interval, check_predictions
from bmoe_lightning.report.results import MethodResult, SummarySettings, by_method

_GRID = 20_001


@dataclass(frozen=True)
class Difference:
    """A metric of one method less that of another, or the change relative to the other.

    Attributes:
        method: Slug of the one method.
        other: Slug of the other.
        metric: Name of the metric.
        relative: Whether it is `method / other - 1` in place of `method - other`.
        estimate: Difference of the means over data sets and seeds.
        low: Lower end of the interval.
        high: Upper end.
        level: Coverage of the interval.
        seeds: Seeds that both methods have, on all data sets.
        num_examples: Number of items of each data set.
    """

    method: str
    other: str
    metric: str
    relative: bool
    estimate: float
    low: float
    high: float
    level: float
    seeds: tuple[int, ...]
    num_examples: tuple[int, ...]


@dataclass(frozen=True)
class Paired:
    """The results of two methods on one data set.

    Attributes:
        ours: Results of the one method, over its seeds.
        others: Results of the other, on the same items.
    """

    ours: Sequence[MethodResult]
    others: Sequence[MethodResult]


def paired_difference(
    pairs: Sequence[Paired], metric: MetricSpec, settings: SummarySettings | None = None, *, relative: bool = False
) -> Difference:
    """The difference between two methods, a mean over data sets and the seeds that both have, with its interval.

    Items that several data sets share, by their ids, are drawn together, since a model that knows one knows the others.

    Args:
        pairs: Results on each data set, at least one.
        metric: Metric to compare.
        settings: ECE convention, number of resamples, level and seed of the bootstrap; defaults if None.
        relative: Whether to divide by the metric of the other method.

    Raises:
        ValueError: If there are no pairs, the methods share no seed, or results cannot be compared; see `by_method`.
    """
    if not pairs:
        raise ValueError("there are no results to compare; pass at least one pair")
    chosen = settings or SummarySettings()
    seeds = _common_seeds(pairs)
    drawn_items = joint_resamples(
        [pair.ours[0].ids for pair in pairs], num_samples=chosen.num_samples, seed=chosen.bootstrap_seed
    )
    ours, others = (
        _Values.of([_in_order(group, seeds) for group in groups], drawn_items, metric, chosen)
        for groups in ([pair.ours for pair in pairs], [pair.others for pair in pairs])
    )
    weights = _seed_weights(len(seeds), chosen.num_samples, chosen.bootstrap_seed)
    estimate = float(_contrast(ours.on_data.mean(0), others.on_data.mean(0), relative))
    samples = _contrast((ours.on_resamples * weights).sum(1), (others.on_resamples * weights).sum(1), relative)
    interval = centred_interval(samples, estimate, chosen.level)
    wider = _widening(ours, others, chosen.level, relative)
    return Difference(
        method=pairs[0].ours[0].method,
        other=pairs[0].others[0].method,
        metric=metric.name,
        relative=relative,
        estimate=estimate,
        low=_moved(estimate, interval.low, wider),
        high=_moved(estimate, interval.high, wider),
        level=chosen.level,
        seeds=seeds,
        num_examples=tuple(len(pair.ours[0].ids) for pair in pairs),
    )


def joint_resamples(ids: Sequence[tuple[str, ...]], *, num_samples: int, seed: int) -> list[Resamples]:
    """Resamples of several data sets in which the items that they share are drawn together.

    Items are drawn with replacement within groups of those that are in the same data sets, so that each resample of a
    data set is as large as the data set. With one data set, or without shared items, this is the plain bootstrap.

    Args:
        ids: Unique ids of the items of each data set.
        num_samples: Number of resamples R.
        seed: Seed of the draws; the global generator is not used.

    Returns:
        For each data set, resamples of its N items: indices `[R, N]`.
    """
    places = [{item: place for place, item in enumerate(of_set)} for of_set in ids]
    groups: dict[tuple[int, ...], list[str]] = {}
    for item in dict.fromkeys(item for of_set in ids for item in of_set):
        groups.setdefault(tuple(n for n, of_set in enumerate(places) if item in of_set), []).append(item)
    generator = torch.Generator().manual_seed(seed)
    drawn: list[list[Tensor]] = [[] for _ in ids]
    for members, items in groups.items():
        draws = torch.randint(len(items), (num_samples, len(items)), generator=generator)
        for member in members:
            drawn[member].append(torch.tensor([places[member][item] for item in items])[draws])
    return [Resamples(torch.cat(parts, dim=1)) for parts in drawn]


def student_quantile(probability: float, degrees: float) -> float:
    """Quantile of Student's t distribution.

    With `t = sqrt(nu) tan(u)` its density is proportional to `cos(u)^(nu - 1)`, which is integrated numerically.

    Args:
        probability: Probability in (0, 1).
        degrees: Degrees of freedom nu, at least 1.
    """
    # Above, where cos(u) is rounded to 1, it is the normal distribution's to six digits.
    degrees = min(degrees, 1e6)
    # With many degrees of freedom the density is narrow, and outside of this interval below e^-72.
    width = min(math.pi / 2, 12 / math.sqrt(degrees))
    angle = torch.linspace(-width, width, _GRID, dtype=torch.float64)
    mass = torch.cumulative_trapezoid(angle.cos().clamp(min=0) ** (degrees - 1), angle)
    place = min(int(torch.searchsorted(mass, probability * mass[-1])), len(mass) - 1)
    before = mass[place - 1] if place else mass.new_zeros(())
    inside = (probability * mass[-1] - before) / (mass[place] - before)
    return math.sqrt(degrees) * math.tan(float(angle[place] + inside * (angle[place + 1] - angle[place])))


@dataclass(frozen=True, eq=False)
class _Values:
    """A metric of one method, a mean over data sets.

    Attributes:
        on_data: Value of each seed, `[S]` float64.
        on_resamples: Value of each seed on every resample, `[R, S]` float64.
    """

    on_data: Tensor
    on_resamples: Tensor

    @classmethod
    def of(
        cls,
        groups: Sequence[Sequence[MethodResult]],
        resamples: Sequence[Resamples],
        metric: MetricSpec,
        settings: SummarySettings,
    ) -> _Values:
        on_data, on_resamples = [], []
        for group, drawn in zip(groups, resamples, strict=True):
            checked = [check_predictions(r.log_probs.detach().cpu(), r.target.cpu()) for r in group]
            on_data.append(torch.stack([metric.value(*each, settings.binning) for each in checked]))
            on_resamples.append(
                torch.stack([metric.resampled(*each, settings.binning)(drawn) for each in checked], dim=1)
            )
        return cls(torch.stack(on_data).mean(0), torch.stack(on_resamples).mean(0))


def _contrast(ours: Tensor, others: Tensor, relative: bool) -> Tensor:
    return ours / others - 1 if relative else ours - others


def _common_seeds(pairs: Sequence[Paired]) -> tuple[int, ...]:
    groups = [group for pair in pairs for group in (pair.ours, pair.others)]
    for pair in pairs:
        by_method([*pair.ours, *pair.others])
    seeds = set.intersection(*({result.seed for result in group} for group in groups))
    if not seeds:
        names = f"{pairs[0].ours[0].method} and {pairs[0].others[0].method}"
        raise ValueError(f"{names} have no seed in common; compare results of the same seeds")
    return tuple(sorted(seeds))


def _in_order(group: Sequence[MethodResult], seeds: tuple[int, ...]) -> list[MethodResult]:
    by_seed = {result.seed: result for result in group}
    return [by_seed[seed] for seed in seeds]


def _seed_weights(number: int, num_samples: int, seed: int) -> Tensor:
    """Weights of S seeds in each resample, `[R, S]`: they add up to one, with variances that estimate without bias."""
    if number == 1:
        return torch.ones(num_samples, 1, dtype=torch.float64)
    # Another stream than that of the items, which a seed of theirs must not repeat.
    generator = torch.Generator().manual_seed(2**32 + seed)
    drawn = Resamples(torch.randint(number, (num_samples, number), generator=generator))
    return 1 / number + math.sqrt(number / (number - 1)) * (drawn.counts / number - 1 / number)


def _widening(ours: _Values, others: _Values, level: float, relative: bool) -> float:
    """Student's t over the normal quantile, for the variance over seeds and that over items together."""
    number = len(ours.on_data)
    per_seed = _contrast(ours.on_data, others.on_data, relative)
    on_resamples = _contrast(ours.on_resamples.mean(1), others.on_resamples.mean(1), relative)
    of_seeds = float(per_seed.var()) / number if number > 1 else 0.0
    of_items = float(on_resamples.var()) if len(on_resamples) > 1 else 0.0
    if not (math.isfinite(of_seeds + of_items) and of_seeds > 0):
        return 1.0
    degrees = (of_seeds + of_items) ** 2 / (of_seeds**2 / (number - 1))
    upper = (1 + level) / 2
    return student_quantile(upper, degrees) / float(torch.special.ndtri(torch.tensor(upper, dtype=torch.float64)))


def _moved(estimate: float, end: float, factor: float) -> float:
    return estimate + factor * (end - estimate) if math.isfinite(end - estimate) else end
