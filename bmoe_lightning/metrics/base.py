"""The torchmetrics base classes: means over examples, and values that need all examples at once.

States of means are fixed-size float64 sums, so results over batches, ranks or hosts merge by addition. State names are
unique to each class: the compute groups of a `MetricCollection` merge metrics whose state names and first values agree.
Updates are out of place, because a state that was reset under `torch.inference_mode` cannot be written to outside of
it. MPS has no float64: there, leave these objects on the CPU, or use the functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from bmoe_lightning.metrics.inputs import check_predictions

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class MeanOverExamples(Metric):
    """Base class of metrics that are a mean over examples; a subclass defines `prefix` and `per_example`."""

    full_state_update = False
    plot_lower_bound = 0.0

    prefix: str

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for state in ("sum", "count"):
            self.add_state(f"{self.prefix}_{state}", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    @staticmethod
    def per_example(log_probs: Tensor, target: Tensor) -> Tensor:
        """Value of each example, `[N]` float64.

        Args:
            log_probs: Log-probabilities `[N, K]`, checked.
            target: Class indices `[N]`, checked.
        """
        raise NotImplementedError

    def update(self, log_probs: Tensor, target: Tensor) -> None:
        """Add a batch.

        Args:
            log_probs: Normalised natural log-probabilities, `[N, K]`.
            target: Class indices, `[N]`.

        Raises:
            TypeError: If a tensor has the wrong dtype; see `check_predictions`.
            ValueError: If the predictions are refused; see `check_predictions`.
        """
        values = self.per_example(*check_predictions(log_probs, target))
        add_to_state(self, f"{self.prefix}_sum", values.sum())
        add_to_state(self, f"{self.prefix}_count", torch.full_like(values.sum(), len(values)))

    def compute(self) -> Tensor:
        """Mean over all examples so far, a float64 scalar; NaN, with torchmetrics' warning, before any update."""
        return getattr(self, f"{self.prefix}_sum") / getattr(self, f"{self.prefix}_count")

    def plot(self, val: Any = None, ax: Axes | None = None) -> Any:
        """Plot with `torchmetrics`, which needs matplotlib.

        Args:
            val: A value or a sequence of them; None for the value so far.
            ax: Axes to draw on; a new figure if None.
        """
        return self._plot(val, ax)


WeightedValue = Callable[[Tensor], Tensor]
"""From multiplicities `[R, N]` of the examples, float64 integers with at least one example a row, to values `[R]`."""


class OverAllExamples(Metric):
    """Base class of metrics that need all examples at once; a subclass defines `prefix` and `weighted`.

    All predictions are states, so memory grows with the number of examples. Over ranks they are concatenated; neither
    the order of the examples nor how they are split into batches or over ranks changes the value, unless the subclass
    says so.
    """

    is_differentiable = False
    full_state_update = False
    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0

    prefix: str

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # A rank without examples contributes an empty tensor of this dtype, which must be that of the other ranks.
        self.set_dtype(torch.float64)
        for state in ("log_probs", "target"):
            self.add_state(f"{self.prefix}_{state}", [], dist_reduce_fx="cat")
        self.add_state(f"{self.prefix}_classes", torch.zeros((), dtype=torch.float64), dist_reduce_fx="max")

    def weighted(self, log_probs: Tensor, target: Tensor) -> WeightedValue:
        """The metric as a function of how often each example counts; does the work that all resamples share.

        Args:
            log_probs: Log-probabilities `[N, K]`, checked.
            target: Class indices `[N]`, checked.
        """
        raise NotImplementedError

    def value(self, log_probs: Tensor, target: Tensor) -> Tensor:
        """The metric with each example counted once, a float64 scalar.

        Args:
            log_probs: Log-probabilities `[N, K]`, checked.
            target: Class indices `[N]`, checked.
        """
        return once(self.weighted, log_probs, target)

    def update(self, log_probs: Tensor, target: Tensor) -> None:
        """Add a batch.

        Args:
            log_probs: Normalised natural log-probabilities, `[N, K]`; K is the same for all batches.
            target: Class indices, `[N]`.

        Raises:
            TypeError: If a tensor has the wrong dtype; see `check_predictions`.
            ValueError: If the predictions are refused; see `check_predictions`.
        """
        log_probs, target = check_predictions(log_probs.detach(), target)
        # Flat, since ranks exchange states, and one without examples does not know the number of classes.
        getattr(self, f"{self.prefix}_log_probs").append(log_probs.flatten())
        getattr(self, f"{self.prefix}_target").append(target.double())
        seen: Tensor = getattr(self, f"{self.prefix}_classes")
        setattr(self, f"{self.prefix}_classes", seen.clamp(min=log_probs.shape[1]))

    def compute(self) -> Tensor:
        """Value on all examples so far, a float64 scalar; NaN, with torchmetrics' warning, before any update.

        Raises:
            ValueError: If batches had different numbers of classes.
        """
        classes = int(getattr(self, f"{self.prefix}_classes"))
        if not classes:
            return torch.tensor(torch.nan, dtype=torch.float64, device=self.device)
        log_probs = dim_zero_cat(getattr(self, f"{self.prefix}_log_probs"))
        target = dim_zero_cat(getattr(self, f"{self.prefix}_target")).long()
        if log_probs.numel() != len(target) * classes:
            raise ValueError(
                f"batches had different numbers of classes, {classes} at most; add columns of -inf for absent ones"
            )
        return self.value(log_probs.view(-1, classes), target)

    def plot(self, val: Any = None, ax: Axes | None = None) -> Any:
        """Plot with `torchmetrics`, which needs matplotlib.

        Args:
            val: A value or a sequence of them; None for the value so far.
            ax: Axes to draw on; a new figure if None.
        """
        return self._plot(val, ax)


def once(weighted: Callable[[Tensor, Tensor], WeightedValue], log_probs: Tensor, target: Tensor) -> Tensor:
    """The value with each example counted once, a scalar.

    Args:
        weighted: From predictions to the metric as a function of multiplicities.
        log_probs: Log-probabilities `[N, K]`, checked.
        target: Class indices `[N]`, checked.
    """
    return weighted(log_probs, target)(torch.ones(1, len(target), dtype=torch.float64, device=target.device))[0]


def add_to_state(metric: Metric, state: str, value: Tensor) -> None:
    """Add to a state of a metric, out of place.

    Args:
        metric: Metric to update.
        state: Name of the state.
        value: Increment, float64.
    """
    current: Tensor = getattr(metric, state)
    # Converting a module to bfloat16 converts the states of its metrics too, where a count stops growing at 256; adding
    # out of place promotes them back to float64.
    setattr(metric, state, current + value.to(current.device))
