"""Predictions of each method on the test items, and their summary, one row for each method."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bmoe_lightning.metrics import (
    HEADLINE_METRICS,
    BinConvention,
    Binning,
    MetricSpec,
    calibration_resamples,
    calibration_values,
    centred_interval,
    check_predictions,
    get_metric,
)
from bmoe_lightning.metrics.ece import convention_text

HyperparameterValue = bool | int | float | str

_SLUG = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True, eq=False)
class MethodResult:
    """Predictions of one method, trained with one seed, on the test items.

    Attributes:
        method: Short slug such as `my_method`; lower-case letters, digits and underscores.
        label: Display name.
        seed: Training seed.
        log_probs: Normalised natural log-probabilities, `[N, K]`; `-inf` for absent classes.
        target: Class indices, `[N]`.
        ids: Unique id of each item.
        extra: Further numbers for the table, such as a fitted temperature.
        hyperparameters: Options of the method, the same for all seeds.
        warnings: What makes the result doubtful, one sentence each: footnotes of the table.
        uncertainty: Scores `[N]` by name, higher where a prediction is more uncertain, beyond those of `log_probs`.

    Raises:
        TypeError: If the tensors have the wrong dtype.
        ValueError: If the slug or the predictions are refused, or the ids do not name N different items.
    """

    method: str
    label: str
    seed: int
    log_probs: Tensor
    target: Tensor
    ids: tuple[str, ...]
    extra: Mapping[str, float] = field(default_factory=dict)
    hyperparameters: Mapping[str, HyperparameterValue] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    uncertainty: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not _SLUG.fullmatch(self.method):
            raise ValueError(
                f"method must be a slug of lower-case letters, digits and underscores, found {self.method!r}; "
                "use label for the display name"
            )
        try:
            check_predictions(self.log_probs, self.target)
        except (TypeError, ValueError) as error:
            raise type(error)(f"predictions of {self.method} (seed {self.seed}): {error}") from error
        if len(self.ids) != len(self.target) or len(set(self.ids)) != len(self.ids):
            raise ValueError(
                f"{self.method} (seed {self.seed}) has {len(self.target)} predictions, but {len(self.ids)} ids, "
                f"{len(set(self.ids))} of them different; give every item an id"
            )
        if wrong := [name for name, scores in self.uncertainty.items() if scores.shape != self.target.shape]:
            raise ValueError(
                f"{self.method} (seed {self.seed}) has {len(self.target)} predictions, but scores of "
                f"{', '.join(wrong)} in other shapes; give one score for each"
            )


@dataclass(frozen=True)
class SummarySettings:
    """Settings of the summary; part of every row, so that a table can name the conventions.

    Attributes:
        num_bins: Number of ECE bins.
        convention: Closed side of the ECE bins.
        num_samples: Number of bootstrap resamples.
        level: Coverage of the bootstrap intervals.
        bootstrap_seed: Seed of the bootstrap.
        further: Names of metrics of the registry beside the headline metrics, for a second table.

    Raises:
        ValueError: If a further metric is not known, is a headline metric or is named twice.
    """

    num_bins: int = 15
    convention: BinConvention = "right"
    num_samples: int = 1000
    level: float = 0.95
    bootstrap_seed: int = 0
    further: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = [metric.name for metric in self.metrics]
        if len(set(names)) < len(names):
            raise ValueError(f"further metrics {self.further} repeat one of {names}; name others, each once")

    @property
    def metrics(self) -> tuple[MetricSpec, ...]:
        """The headline metrics, then the further ones."""
        return (*HEADLINE_METRICS, *map(get_metric, self.further))

    @property
    def binning(self) -> Binning:
        """Number of bins and convention."""
        return Binning(self.num_bins, self.convention)

    def ece_convention(self) -> str:
        """The ECE convention in words."""
        return convention_text(self.binning)

    def interval(self) -> str:
        """The interval in words."""
        return f"{100 * self.level:g} % centred percentile bootstrap over test items, {self.num_samples} resamples"


@dataclass(frozen=True)
class MetricSummary:
    """One metric of one method.

    Attributes:
        mean: Mean over seeds.
        std: Standard deviation over seeds (n - 1); None for a single seed.
        low: Lower end of the bootstrap interval of the mean.
        high: Upper end.
    """

    mean: float
    std: float | None
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """One method in the table.

    Attributes:
        method: Slug.
        label: Display name.
        seeds: Training seeds, ascending.
        num_examples: Number of test items N.
        metrics: The headline metrics by name, then the further ones.
        extra: Means over seeds of the further numbers.
        settings: Settings of the summary.
        hyperparameters: Options of the method.
        warnings: What makes the results doubtful, one sentence each; with several seeds, with those it is about.
    """

    method: str
    label: str
    seeds: tuple[int, ...]
    num_examples: int
    metrics: dict[str, MetricSummary]
    extra: dict[str, float]
    settings: SummarySettings
    hyperparameters: dict[str, HyperparameterValue] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def by_method(results: Sequence[MethodResult]) -> dict[str, list[MethodResult]]:
    """Group results by method, in order of first appearance; within a method by seed.

    Args:
        results: Any number of methods and seeds.

    Raises:
        ValueError: If there are no results, a method has one seed twice, two labels or different options, or results do
            not cover the same items with the same answers in the same order.
    """
    if not results:
        raise ValueError("there are no results to report; pass at least one")
    groups: dict[str, list[MethodResult]] = {}
    for result in results:
        _check_same_items(results[0], result)
        groups.setdefault(result.method, []).append(result)
    for method, group in groups.items():
        group.sort(key=lambda result: result.seed)
        seeds = [result.seed for result in group]
        if len(set(seeds)) != len(seeds):
            raise ValueError(f"{method} has more than one result for a seed: {seeds}; leave one of them out")
        if len({result.label for result in group}) > 1:
            labels = sorted({result.label for result in group})
            raise ValueError(f"{method} has several labels: {labels}; give all its seeds the same")
        if any(dict(result.hyperparameters) != dict(group[0].hyperparameters) for result in group):
            raise ValueError(f"{method} has other options for some seeds; give methods with other options other names")
    return groups


def _check_same_items(first: MethodResult, other: MethodResult) -> None:
    if first.ids != other.ids or not torch.equal(first.target.cpu(), other.target.cpu()):
        raise ValueError(
            f"{other.method} (seed {other.seed}) was not evaluated on the same items, in the same order and with the "
            f"same answers, as {first.method} (seed {first.seed}); summarise results on different test sets separately"
        )


def seed_values(result: MethodResult, settings: SummarySettings) -> dict[str, float]:
    """The metrics of one method and seed.

    Args:
        result: Predictions.
        settings: ECE convention, and further metrics.
    """
    return calibration_values(
        result.log_probs,
        result.target,
        num_bins=settings.num_bins,
        convention=settings.convention,
        metrics=settings.metrics,
    )


def summarise(results: Sequence[MethodResult], settings: SummarySettings | None = None) -> list[Row]:
    """One row a method, in order of first appearance: mean and deviation over seeds, and a bootstrap interval.

    The interval is that of the mean over seeds: each resample of the items is shared by all seeds and methods. It
    describes the variation over test items, and the deviation that over training seeds.

    Args:
        results: Any number of methods and seeds, all on the same items.
        settings: Defaults if None.

    Raises:
        ValueError: If the results cannot be compared; see `by_method`.
    """
    chosen = settings or SummarySettings()
    return [_row(group, chosen) for group in by_method(results).values()]


def _row(group: list[MethodResult], settings: SummarySettings) -> Row:
    values = [seed_values(result, settings) for result in group]
    resamples = [
        calibration_resamples(
            result.log_probs,
            result.target,
            num_samples=settings.num_samples,
            seed=settings.bootstrap_seed,
            num_bins=settings.num_bins,
            convention=settings.convention,
            metrics=settings.metrics,
        )
        for result in group
    ]
    metrics: dict[str, MetricSummary] = {}
    for metric in settings.metrics:
        per_seed = torch.tensor([value[metric.name] for value in values], dtype=torch.float64)
        mean = float(per_seed.mean())
        samples = torch.stack([sample[metric.name] for sample in resamples]).mean(dim=0)
        interval = centred_interval(samples, mean, settings.level, lower=metric.lower, upper=metric.upper)
        std = float(per_seed.std()) if len(per_seed) > 1 else None
        metrics[metric.name] = MetricSummary(mean, std, interval.low, interval.high)
    return Row(
        method=group[0].method,
        label=group[0].label,
        seeds=tuple(result.seed for result in group),
        num_examples=len(group[0].target),
        metrics=metrics,
        extra=_mean_extra(group),
        settings=settings,
        hyperparameters=dict(group[0].hyperparameters),
        warnings=_warnings(group),
    )


def _warnings(group: list[MethodResult]) -> tuple[str, ...]:
    sentences = dict.fromkeys(sentence for result in group for sentence in result.warnings)
    seeds = {sentence: [result.seed for result in group if sentence in result.warnings] for sentence in sentences}
    return tuple(
        sentence if len(of_sentence) == len(group) else f"seed {', '.join(map(str, of_sentence))}: {sentence}"
        for sentence, of_sentence in seeds.items()
    )


def _mean_extra(group: list[MethodResult]) -> dict[str, float]:
    names = list(dict.fromkeys(name for result in group for name in result.extra))
    means = {}
    for name in names:
        values = [float(result.extra[name]) for result in group if name in result.extra]
        means[name] = sum(values) / len(values)
    return means
