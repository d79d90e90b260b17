"""The description of a metric, which tables, intervals and documentation are made from; each metric's file has one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torchmetrics import Metric

from bmoe_lightning.metrics.base import MeanOverExamples, OverAllExamples
from bmoe_lightning.metrics.binning import Binning


@dataclass(frozen=True, eq=False)
class Resamples:
    """A chunk of bootstrap resamples of N examples.

    Attributes:
        indices: Drawn examples, `[R, N]` int64.
    """

    indices: Tensor

    @cached_property
    def counts(self) -> Tensor:
        """Number of times that each example was drawn, `[R, N]` float64."""
        counts = torch.zeros(self.indices.shape, dtype=torch.float64)
        return counts.scatter_add_(1, self.indices, torch.ones((), dtype=torch.float64).expand(self.indices.shape))


@dataclass(frozen=True)
class MetricSpec:
    """A metric: its names, its definition, its value, and its value on resamples.

    Attributes:
        name: Key in results and logged names.
        title: Column title.
        higher_is_better: Whether higher values are better; None if neither are, as for a value that has a target.
        definition: Definition and convention in a phrase, for the table of all metrics.
        lower: Smallest value that the metric can have.
        upper: Largest value that it can have.
        value: Function `(log_probs, target, binning) -> scalar` of checked predictions.
        resampled: Function `(log_probs, target, binning) -> (Resamples -> [R])` of checked predictions on the CPU: it
            does the work that all resamples share, and returns a function that is called on chunks of resamples.
        torchmetric: Function `binning -> torchmetrics.Metric`, the torchmetrics class.
        note: Function `binning -> sentence` for the caption of a table; an empty sentence for none.
    """

    name: str
    title: str
    higher_is_better: bool | None
    definition: str
    lower: float
    upper: float
    value: Callable[[Tensor, Tensor, Binning], Tensor]
    resampled: Callable[[Tensor, Tensor, Binning], Callable[[Resamples], Tensor]]
    torchmetric: Callable[[Binning], Metric]
    note: Callable[[Binning], str]

    @property
    def header(self) -> str:
        """Column title with an arrow in the better direction, if there is one."""
        if self.higher_is_better is None:
            return self.title
        return f"{self.title} {'↑' if self.higher_is_better else '↓'}"


def mean_over_examples(
    name: str, title: str, metric: type[MeanOverExamples], *, definition: str, upper: float, note: str = ""
) -> MetricSpec:
    """Describe a metric that is the mean of a value per example and does not depend on bins.

    Args:
        name: Key in results and logged names.
        title: Column title.
        metric: Torchmetrics class, which computes the value per example.
        definition: Definition and convention in a phrase.
        upper: Largest possible value; the smallest is 0.
        note: Sentence for the caption of a table; empty for none.
    """

    def value(log_probs: Tensor, target: Tensor, binning: Binning) -> Tensor:  # noqa: ARG001
        return metric.per_example(log_probs, target).mean()

    def resampled(log_probs: Tensor, target: Tensor, binning: Binning) -> Callable[[Resamples], Tensor]:  # noqa: ARG001
        values = metric.per_example(log_probs, target)
        # Indexed, not weighted by counts: an infinite value that was not drawn would become 0 * inf.
        return lambda resamples: values[resamples.indices].mean(dim=1)

    return MetricSpec(
        name=name,
        title=title,
        higher_is_better=metric.higher_is_better,
        definition=definition,
        lower=0.0,
        upper=upper,
        value=value,
        resampled=resampled,
        torchmetric=lambda binning: metric(),  # noqa: ARG005
        note=lambda binning: note,  # noqa: ARG005
    )


def over_all_examples(
    name: str,
    title: str,
    metric: Callable[[Binning], OverAllExamples],
    *,
    definition: str,
    lower: float = 0.0,
    upper: float = 1.0,
    note: str = "",
) -> MetricSpec:
    """Describe a metric that needs all examples at once.

    Args:
        name: Key in results and logged names.
        title: Column title.
        metric: Function `binning -> torchmetrics class instance`, which computes the value from multiplicities.
        definition: Definition and convention in a phrase.
        lower: Smallest possible value.
        upper: Largest possible value.
        note: Sentence for the caption of a table; empty for none.
    """

    def resampled(log_probs: Tensor, target: Tensor, binning: Binning) -> Callable[[Resamples], Tensor]:
        weighted = metric(binning).weighted(log_probs, target)
        return lambda resamples: weighted(resamples.counts)

    return MetricSpec(
        name=name,
        title=title,
        higher_is_better=metric(Binning()).higher_is_better,
        definition=definition,
        lower=lower,
        upper=upper,
        value=lambda log_probs, target, binning: metric(binning).value(log_probs, target),
        resampled=resampled,
        torchmetric=metric,
        note=lambda binning: note,  # noqa: ARG005
    )
