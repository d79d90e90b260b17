"""What a metric of the results table is made of; each metric's file describes its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torchmetrics import Metric

from bmoe_lightning.metrics.base import MeanOverExamples
from bmoe_lightning.metrics.binning import Binning


@dataclass(frozen=True, eq=False)
class Resamples:
    """Some bootstrap resamples of N examples.

    Attributes:
        indices: Drawn examples, `[R, N]` int64.
    """

    indices: Tensor

    @cached_property
    def counts(self) -> Tensor:
        """How often each example was drawn, `[R, N]` float64."""
        counts = torch.zeros(self.indices.shape, dtype=torch.float64)
        return counts.scatter_add_(1, self.indices, torch.ones((), dtype=torch.float64).expand(self.indices.shape))


@dataclass(frozen=True)
class HeadlineMetric:
    """A metric of the results table: its names, its value, and its value on resamples.

    Attributes:
        name: Key in results and logged names.
        title: Column title.
        higher_is_better: Which direction is better.
        value: `(log_probs, target, binning) -> scalar`, from checked predictions.
        resampled: `(log_probs, target, binning) -> (Resamples -> [R])`, from checked predictions on the CPU: what can
            be done once comes before the function that is called for some resamples at a time.
        torchmetric: `binning -> torchmetrics.Metric`, the class twin.
        note: `binning -> sentence`, what a reader of a table has to know; empty for nothing.
        interval_note: Said below a table in which an interval does not hold its value; empty for nothing.
    """

    name: str
    title: str
    higher_is_better: bool
    value: Callable[[Tensor, Tensor, Binning], Tensor]
    resampled: Callable[[Tensor, Tensor, Binning], Callable[[Resamples], Tensor]]
    torchmetric: Callable[[Binning], Metric]
    note: Callable[[Binning], str]
    interval_note: str = ""

    @property
    def header(self) -> str:
        """Column title with an arrow in the better direction."""
        return f"{self.title} {'↑' if self.higher_is_better else '↓'}"


def mean_over_examples(name: str, title: str, metric: type[MeanOverExamples], note: str = "") -> HeadlineMetric:
    """Describe a metric that is the mean of a value per example and does not depend on bins.

    Args:
        name: Key in results and logged names.
        title: Column title.
        metric: The class twin, which has the value per example.
        note: What a reader of a table has to know; empty for nothing.
    """

    def value(log_probs: Tensor, target: Tensor, binning: Binning) -> Tensor:  # noqa: ARG001
        return metric.per_example(log_probs, target).mean()

    def resampled(log_probs: Tensor, target: Tensor, binning: Binning) -> Callable[[Resamples], Tensor]:  # noqa: ARG001
        values = metric.per_example(log_probs, target)
        # Gathered, not weighted by counts: an infinite value that was not drawn must not become 0 * inf.
        return lambda resamples: values[resamples.indices].mean(dim=1)

    return HeadlineMetric(
        name=name,
        title=title,
        higher_is_better=bool(metric.higher_is_better),
        value=value,
        resampled=resampled,
        torchmetric=lambda binning: metric(),  # noqa: ARG005
        note=lambda binning: note,  # noqa: ARG005
    )
