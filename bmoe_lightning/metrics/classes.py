"""The metrics as ``torchmetrics`` classes: state and synchronisation only, the mathematics is in ``functional``.

States are fixed-size float64 sums, so results over batches, ranks or hosts merge by addition. Every class names its
states apart from the others: a ``MetricCollection`` takes metrics for one and the same when their state names and first
values agree. Updates are out of place, because a state that was reset under ``torch.inference_mode`` may not be written
to outside it. float64 does not exist on MPS: keep these objects on the CPU there, or use the functions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from bmoe_lightning.metrics.functional import (
    BinConvention,
    BinTotals,
    CalibrationNorm,
    bin_totals,
    calibration_error_from_totals,
    check_binning,
    check_predictions,
    curve_from_totals,
    example_brier,
    example_nll,
    top_label,
)
from bmoe_lightning.metrics.plotting import draw_reliability_curve, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure


class _MeanOverExamples(Metric):
    """Mean of a per-example value; a subclass names its states and says what the value is."""

    full_state_update = False
    plot_lower_bound = 0.0

    prefix: str

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for state in ("sum", "count"):
            self.add_state(f"{self.prefix}_{state}", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    @staticmethod
    def per_example(log_probs: Tensor, target: Tensor) -> Tensor:
        """Value of each example: ``[N]`` float64, from checked ``log_probs [N, K]`` and ``target [N]``."""
        raise NotImplementedError

    def update(self, log_probs: Tensor, target: Tensor) -> None:
        """Add a batch.

        Args:
            log_probs: ``[N, K]``, normalised natural log-probabilities.
            target: ``[N]``, class indices.

        Raises:
            TypeError: See :func:`~bmoe_lightning.metrics.functional.check_predictions`.
            ValueError: See :func:`~bmoe_lightning.metrics.functional.check_predictions`.
        """
        values = self.per_example(*check_predictions(log_probs, target))
        _add(self, f"{self.prefix}_sum", values.sum())
        _add(self, f"{self.prefix}_count", torch.full_like(values.sum(), len(values)))

    def compute(self) -> Tensor:
        """Mean over all examples so far, a float64 scalar; NaN, with torchmetrics' warning, before any update."""
        return getattr(self, f"{self.prefix}_sum") / getattr(self, f"{self.prefix}_count")

    def plot(self, val: Any = None, ax: Axes | None = None) -> Any:
        """Plot one value, or a sequence of them, with ``torchmetrics``; needs matplotlib."""
        return self._plot(val, ax)


class Accuracy(_MeanOverExamples):
    """Fraction of examples whose most probable class is the target; see ``functional.accuracy``."""

    is_differentiable = False
    higher_is_better = True
    plot_upper_bound = 1.0
    prefix = "accuracy"

    accuracy_sum: Tensor
    accuracy_count: Tensor

    @staticmethod
    def per_example(log_probs: Tensor, target: Tensor) -> Tensor:
        """1 where the most probable class is the target, else 0: ``[N]``."""
        return top_label(log_probs, target)[1]


class NegativeLogLikelihood(_MeanOverExamples):
    """Mean negative log-likelihood in nats; see ``functional.negative_log_likelihood``."""

    is_differentiable = True
    higher_is_better = False
    prefix = "nll"

    nll_sum: Tensor
    nll_count: Tensor

    @staticmethod
    def per_example(log_probs: Tensor, target: Tensor) -> Tensor:
        """Negative log-probability of the target: ``[N]``."""
        return example_nll(log_probs, target)


class BrierScore(_MeanOverExamples):
    """Mean squared error of the probabilities, summed over classes; see ``functional.brier_score``."""

    is_differentiable = True
    higher_is_better = False
    plot_upper_bound = 2.0
    prefix = "brier"

    brier_sum: Tensor
    brier_count: Tensor

    @staticmethod
    def per_example(log_probs: Tensor, target: Tensor) -> Tensor:
        """Squared error summed over classes: ``[N]``."""
        return example_brier(log_probs, target)


class _OverConfidenceBins(Metric):
    """Sums per confidence bin; a subclass names its states and says what follows from the sums."""

    is_differentiable = False
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    prefix: str

    def __init__(self, num_bins: int = 15, convention: BinConvention = "right", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_binning(num_bins, convention)
        self.num_bins = num_bins
        self.convention: BinConvention = convention
        for state in BinTotals._fields:
            self.add_state(f"{self.prefix}_{state}", torch.zeros(num_bins, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, log_probs: Tensor, target: Tensor) -> None:
        """Add a batch.

        Args:
            log_probs: ``[N, K]``, normalised natural log-probabilities.
            target: ``[N]``, class indices.

        Raises:
            TypeError: See :func:`~bmoe_lightning.metrics.functional.check_predictions`.
            ValueError: See :func:`~bmoe_lightning.metrics.functional.check_predictions`.
        """
        totals = bin_totals(*check_predictions(log_probs, target), self.num_bins, self.convention)
        for state, value in totals._asdict().items():
            _add(self, f"{self.prefix}_{state}", value)

    def _totals(self) -> BinTotals:
        return BinTotals(*(getattr(self, f"{self.prefix}_{state}") for state in BinTotals._fields))


class ExpectedCalibrationError(_OverConfidenceBins):
    """Top-label calibration error over equal-width bins; see ``functional.expected_calibration_error``.

    Args:
        num_bins: Number of bins.
        convention: Closed side of the bins.
        norm: How gaps are combined over bins.
        kwargs: Passed on to ``torchmetrics.Metric``.

    Raises:
        ValueError: If a setting is not supported.
    """

    higher_is_better = False
    prefix = "ece"

    ece_number: Tensor
    ece_confidence: Tensor
    ece_correct: Tensor

    def __init__(
        self,
        num_bins: int = 15,
        convention: BinConvention = "right",
        norm: CalibrationNorm = "l1",
        **kwargs: Any,
    ) -> None:
        check_binning(num_bins, convention, norm)
        super().__init__(num_bins, convention, **kwargs)
        self.norm: CalibrationNorm = norm

    def compute(self) -> Tensor:
        """Calibration error of all examples so far, a float64 scalar; NaN, with a warning, before any update."""
        return calibration_error_from_totals(self._totals(), self.norm)

    def plot(self, val: Any = None, ax: Axes | None = None) -> Any:
        """Plot one value, or a sequence of them, with ``torchmetrics``; needs matplotlib."""
        return self._plot(val, ax)


class ReliabilityDiagram(_OverConfidenceBins):
    """Confidence against accuracy per bin; see ``functional.reliability_curve``.

    Args:
        num_bins: Number of bins.
        convention: Closed side of the bins.
        kwargs: Passed on to ``torchmetrics.Metric``.

    Raises:
        ValueError: If a setting is not supported.
    """

    higher_is_better = None
    prefix = "reliability"

    reliability_number: Tensor
    reliability_confidence: Tensor
    reliability_correct: Tensor

    def compute(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Bin edges ``[B + 1]``, mean confidence, accuracy and number of examples ``[B]``; NaN in empty bins."""
        curve = curve_from_totals(self._totals())
        return curve.bin_edges, curve.confidence, curve.accuracy, curve.count

    def plot(self, ax: Axes | None = None) -> tuple[Figure | SubFigure, Axes]:
        """Draw the diagram.

        Args:
            ax: Where to draw; a new figure, outside pyplot, if None.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
        """
        if ax is None:
            _, ax = new_axes()
        draw_reliability_curve(ax, curve_from_totals(self._totals()))
        return ax.figure, ax


def calibration_metrics(num_bins: int = 15, convention: BinConvention = "right") -> MetricCollection:
    """Accuracy, ECE, NLL and Brier score under the keys ``acc``, ``ece``, ``nll`` and ``brier``.

    Compute groups are off: they would share one state between metrics that happen to agree on the first batch.

    Args:
        num_bins: Number of ECE bins.
        convention: Closed side of the ECE bins.
    """
    metrics: dict[str, Metric | MetricCollection] = {
        "acc": Accuracy(),
        "ece": ExpectedCalibrationError(num_bins, convention),
        "nll": NegativeLogLikelihood(),
        "brier": BrierScore(),
    }
    return MetricCollection(metrics, compute_groups=False)


def _add(metric: Metric, state: str, value: Tensor) -> None:
    current: Tensor = getattr(metric, state)
    # A module moved to bfloat16 takes its metrics' states along, where a count stops growing at 256; adding out of
    # place promotes them back to float64.
    setattr(metric, state, current + value.to(current.device))
