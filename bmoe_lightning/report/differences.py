"""The difference between two methods: a paired bootstrap over test items and over training seeds.

Items and seeds are crossed, since every seed answers the same items, so both are drawn with replacement, each on its
own (the pigeonhole bootstrap, Owen 2007, https://doi.org/10.1214/07-AOAS122). A seed stands for all that it determines,
such as a pre-training. The interval is about new items *and* new seeds, and two methods share both.

A few seeds resampled are too much alike: their mean varies by `(S - 1) / S` of what it should, and five draws have no
tails. So draws of seeds are spread by `sqrt(S / (S - 1))` around their mean, and the interval is widened from the
normal distribution to Student's t, with Satterthwaite's degrees of freedom for the sum of both variances
(https://doi.org/10.2307/3002019). `tests/report/test_differences.py` measures the coverage.

A change relative to the other is linearised (delta method): with means a and b on the data, a resample with a' and b'
has `a / b - 1 + (a' - (a / b) b') / b`. A ratio of resamples has no bounds, since the weights of spread seeds may be
negative, so that its denominator crosses zero.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bmoe_lightning.metrics import Estimate, MetricSpec, Resamples, centred_interval, check_predictions
from bmoe_lightning.report.results import MethodResult, SummarySettings, by_method

_GRID = 20_001
# The ids of questions whose data set has none: the split and the number of the row.
_ROW_ID = re.compile(r"(train|validation|test)-\d+")


@dataclass(frozen=True)
class Difference:
    """A metric of one method less that of another, or the change relative to the other.

    Attributes:
        method: Slug of the one method.
        other: Slug of the other.
        metric: Name of the metric.
        relative: Whether it is `method / other - 1` in place of `method - other`.
        estimate: Difference of the means over data sets and seeds; NaN if both are infinite, or if it is relative to a
            mean that is not positive.
        low: Lower end of the interval; minus infinity if the estimate or the value of a seed is not finite.
        high: Upper end; infinity in that case.
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


@dataclass(frozen=True, eq=False)
class SeedValues:
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
    ) -> SeedValues:
        """The values from results.

        Args:
            groups: Results of the method on each data set, in the order of the seeds.
            resamples: Resamples of each data set.
            metric: The metric.
            settings: ECE convention.
        """
        on_data, on_resamples = [], []
        for group, drawn in zip(groups, resamples, strict=True):
            checked = [check_predictions(r.log_probs.detach().cpu(), r.target.cpu()) for r in group]
            on_data.append(torch.stack([metric.value(*each, settings.binning) for each in checked]))
            on_resamples.append(
                torch.stack([metric.resampled(*each, settings.binning)(drawn) for each in checked], dim=1)
            )
        return cls(torch.stack(on_data).mean(0), torch.stack(on_resamples).mean(0))


def paired_difference(
    pairs: Sequence[Paired], metric: MetricSpec, settings: SummarySettings | None = None, *, relative: bool = False
) -> Difference:
    """The difference between two methods, a mean over data sets and the seeds that both have, with its interval.

    Items that several data sets share, by their ids, are drawn together, since a model that knows one knows the others.
    Ids such as `test-17`, which a data set without ids of its own gets, are of that data set alone.

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
        [_told_apart(number, pair.ours[0].ids) for number, pair in enumerate(pairs)],
        num_samples=chosen.num_samples,
        seed=chosen.bootstrap_seed,
    )
    ours, others = (
        SeedValues.of([_in_order(group, seeds) for group in groups], drawn_items, metric, chosen)
        for groups in ([pair.ours for pair in pairs], [pair.others for pair in pairs])
    )
    found = seed_difference(ours, others, chosen, relative=relative)
    return Difference(
        method=pairs[0].ours[0].method,
        other=pairs[0].others[0].method,
        metric=metric.name,
        relative=relative,
        estimate=found.value,
        low=found.low,
        high=found.high,
        level=chosen.level,
        seeds=seeds,
        num_examples=tuple(len(pair.ours[0].ids) for pair in pairs),
    )


def seed_difference(
    ours: SeedValues, others: SeedValues, settings: SummarySettings, *, relative: bool = False
) -> Estimate:
    """The difference of two means over seeds, with its interval over new items and new seeds.

    Args:
        ours: A metric of the one method.
        others: The same of the other, on the same resamples and seeds.
        settings: Number of resamples, level and seed of the bootstrap.
        relative: Whether to divide by the other's mean.
    """
    contrast = _Contrast.of(float(ours.on_data.mean()), float(others.on_data.mean()), relative)
    return Estimate(contrast.estimate, *_interval(ours, others, contrast, settings))


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


@dataclass(frozen=True)
class _Contrast:
    """The difference as a linear function of the values of both methods around those on the data.

    Attributes:
        estimate: Its value on the data.
        slopes: Its derivatives by the value of the one method and by that of the other.
    """

    estimate: float
    slopes: tuple[float, float]

    @classmethod
    def of(cls, ours: float, other: float, relative: bool) -> _Contrast:
        if not relative:
            return cls(ours - other, (1.0, -1.0))
        if not other > 0:
            return cls(math.nan, (math.nan, math.nan))
        ratio = ours / other
        return cls(ratio - 1, (1 / other, -ratio / other))

    def of_samples(self, ours: Tensor, others: Tensor) -> Tensor:
        """The contrast of samples, up to a constant, which neither a variance nor a centred interval depends on."""
        return self.slopes[0] * ours + self.slopes[1] * others


def _interval(
    ours: SeedValues, others: SeedValues, contrast: _Contrast, settings: SummarySettings
) -> tuple[float, float]:
    values = torch.cat([ours.on_data, others.on_data])
    if not (math.isfinite(contrast.estimate) and bool(values.isfinite().all())):
        # Infinite values have no spread over seeds, and weights of both signs would make NaN of them.
        return -math.inf, math.inf
    weights = _seed_weights(len(ours.on_data), settings.num_samples, settings.bootstrap_seed)
    samples = contrast.of_samples((ours.on_resamples * weights).sum(1), (others.on_resamples * weights).sum(1))
    interval = centred_interval(samples, contrast.estimate, settings.level)
    wider = _widening(ours, others, settings.level, contrast)
    low, high = (contrast.estimate + wider * (end - contrast.estimate) for end in (interval.low, interval.high))
    return low, high


def _told_apart(number: int, ids: tuple[str, ...]) -> tuple[str, ...]:
    """The ids, with the number of the data set before those that only count its rows."""
    return tuple(f"{number}/{name}" if _ROW_ID.fullmatch(name) else name for name in ids)


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


def _widening(ours: SeedValues, others: SeedValues, level: float, contrast: _Contrast) -> float:
    """Student's t over the normal quantile, for the variance over seeds and that over items together."""
    number = len(ours.on_data)
    per_seed = contrast.of_samples(ours.on_data, others.on_data)
    on_resamples = contrast.of_samples(ours.on_resamples.mean(1), others.on_resamples.mean(1))
    of_seeds = float(per_seed.var()) / number if number > 1 else 0.0
    of_items = float(on_resamples.var()) if len(on_resamples) > 1 else 0.0
    if not (math.isfinite(of_seeds + of_items) and of_seeds > 0):
        return 1.0
    degrees = (of_seeds + of_items) ** 2 / (of_seeds**2 / (number - 1))
    upper = (1 + level) / 2
    return student_quantile(upper, degrees) / float(torch.special.ndtri(torch.tensor(upper, dtype=torch.float64)))
