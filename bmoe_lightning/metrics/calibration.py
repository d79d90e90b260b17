"""The registry of metrics; the first few are the headline metrics, the columns of every results table.

To add one, describe it in a new file and add it to `METRICS`; values, intervals, tables, files and the documentation's
table follow from that list. The torchmetrics collection, TensorBoard and the logged values are of headline metrics.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torchmetrics import Metric, MetricCollection

from bmoe_lightning.metrics import (
    acc,
    adaptive_ece,
    brier,
    classwise_ece,
    conformal,
    detection,
    ece,
    nll,
    refinement,
    selective,
    smooth_ece,
)
from bmoe_lightning.metrics.binning import BinConvention, Binning
from bmoe_lightning.metrics.inputs import check_predictions
from bmoe_lightning.metrics.spec import MetricSpec

HEADLINE_METRICS = (acc.SPEC, ece.SPEC, nll.SPEC, brier.SPEC)
METRICS: tuple[MetricSpec, ...] = (
    *HEADLINE_METRICS,
    *refinement.SPECS,
    smooth_ece.SPEC,
    adaptive_ece.SPEC,
    classwise_ece.SPEC,
    *selective.SPECS,
    *detection.SPECS,
    *conformal.SPECS,
)
METRIC_NAMES = tuple(metric.name for metric in HEADLINE_METRICS)


def get_metric(name: str) -> MetricSpec:
    """A metric of the registry.

    Args:
        name: Its name.

    Raises:
        ValueError: If there is none of that name.
    """
    found = {metric.name: metric for metric in METRICS}.get(name)
    if found is None:
        raise ValueError(f"there is no metric {name!r}; take one of {', '.join(metric.name for metric in METRICS)}")
    return found


def calibration_values(
    log_probs: Tensor,
    target: Tensor,
    *,
    num_bins: int = 15,
    convention: BinConvention = "right",
    metrics: Sequence[MetricSpec] = HEADLINE_METRICS,
) -> dict[str, float]:
    """Metrics in one pass, by name; unless others are given accuracy, ECE, NLL (nats) and Brier score.

    Args:
        log_probs: Normalised natural log-probabilities, `[N, K]`.
        target: Class indices, `[N]`.
        num_bins: Number of ECE bins.
        convention: Closed side of the ECE bins.
        metrics: The metrics.

    Raises:
        TypeError: If a tensor has the wrong dtype; see `check_predictions`.
        ValueError: If the predictions are refused, see `check_predictions`, or a setting is not supported.
    """
    binning = Binning(num_bins, convention)
    log_probs, target = check_predictions(log_probs, target)
    return {metric.name: float(metric.value(log_probs, target, binning)) for metric in metrics}


def calibration_metrics(num_bins: int = 15, convention: BinConvention = "right") -> MetricCollection:
    """All headline metrics as a torchmetrics collection, under their names.

    Compute groups are disabled: they would share one state between metrics that happen to agree on the first batch.

    Args:
        num_bins: Number of ECE bins.
        convention: Closed side of the ECE bins.
    """
    binning = Binning(num_bins, convention)
    metrics: dict[str, Metric | MetricCollection] = {
        metric.name: metric.torchmetric(binning) for metric in HEADLINE_METRICS
    }
    return MetricCollection(metrics, compute_groups=False)
