"""The torchmetrics base class of means over examples.

States are fixed-size float64 sums, so results over batches, ranks or hosts merge by addition. State names are unique to
each class: the compute groups of a `MetricCollection` merge metrics whose state names and first values agree. Updates
are out of place, because a state that was reset under `torch.inference_mode` cannot be written to outside of it. MPS
has no float64: there, leave these objects on the CPU, or use the functions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import Metric

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
