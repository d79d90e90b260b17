"""Reliability curves (DeGroot and Fienberg 1983, https://doi.org/10.2307/2987588): accuracy against confidence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from bmoe_lightning.metrics.binning import BinConvention, Binning, BinTotals, MetricOverBins, bin_edges, bin_totals
from bmoe_lightning.metrics.inputs import check_predictions
from bmoe_lightning.metrics.plotting import draw_reliability_curve, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure


@dataclass(frozen=True, eq=False)
class ReliabilityCurve:
    """Confidence against accuracy, per bin of top-label confidence.

    Attributes:
        bin_edges: Edges of the bins, `[B + 1]`, equally spaced from 0 to 1.
        confidence: Mean confidence of each bin's examples, `[B]`; NaN where the bin is empty.
        accuracy: Accuracy on each bin's examples, `[B]`; NaN where the bin is empty.
        count: Number of examples in each bin, `[B]`.
    """

    bin_edges: Tensor
    confidence: Tensor
    accuracy: Tensor
    count: Tensor


def reliability_curve(
    log_probs: Tensor, target: Tensor, *, num_bins: int = 15, convention: BinConvention = "right"
) -> ReliabilityCurve:
    """Mean confidence and accuracy per confidence bin.

    Args:
        log_probs: Normalised natural log-probabilities, `[N, K]`.
        target: Class indices, `[N]`.
        num_bins: Number of bins.
        convention: Closed side of the bins.

    Raises:
        TypeError: If a tensor has the wrong dtype; see `check_predictions`.
        ValueError: If the predictions are refused, see `check_predictions`, or a setting is not supported.
    """
    binning = Binning(num_bins, convention)
    return curve_from_totals(bin_totals(*check_predictions(log_probs, target), binning))


def curve_from_totals(totals: BinTotals) -> ReliabilityCurve:
    """Reliability curve from sums per bin.

    Args:
        totals: Sums per bin.
    """
    edges = bin_edges(len(totals.number), totals.number.device)
    # 0 / 0 gives the NaN that marks an empty bin.
    return ReliabilityCurve(edges, totals.confidence / totals.number, totals.correct / totals.number, totals.number)


class ReliabilityDiagram(MetricOverBins):
    """Confidence against accuracy per bin; the torchmetrics class of `reliability_curve`.

    Args:
        num_bins: Number of bins.
        convention: Closed side of the bins.
        kwargs: Passed on to `torchmetrics.Metric`.

    Raises:
        ValueError: If a setting is not supported.
    """

    higher_is_better = None
    prefix = "reliability"

    reliability_number: Tensor
    reliability_confidence: Tensor
    reliability_correct: Tensor

    def compute(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Bin edges `[B + 1]`, mean confidence, accuracy and number of examples `[B]`; NaN in empty bins."""
        curve = curve_from_totals(self.totals())
        return curve.bin_edges, curve.confidence, curve.accuracy, curve.count

    def plot(self, ax: Axes | None = None) -> tuple[Figure | SubFigure, Axes]:
        """Draw the diagram.

        Args:
            ax: Axes to draw on; a new figure, outside pyplot, if None.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
        """
        if ax is None:
            _, ax = new_axes()
        draw_reliability_curve(ax, curve_from_totals(self.totals()))
        return ax.figure, ax
