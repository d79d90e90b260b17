"""Calibration metrics from log-probabilities: functions, their torchmetrics twins, and bootstrap intervals."""

from bmoe_lightning.metrics.bootstrap import (
    METRIC_NAMES,
    Estimate,
    Interval,
    MetricName,
    bootstrap_interval,
    calibration_resamples,
    calibration_summary,
    calibration_values,
    percentile_interval,
)
from bmoe_lightning.metrics.classes import (
    Accuracy,
    BrierScore,
    ExpectedCalibrationError,
    NegativeLogLikelihood,
    ReliabilityDiagram,
    calibration_metrics,
)
from bmoe_lightning.metrics.functional import (
    BinConvention,
    CalibrationNorm,
    ReliabilityCurve,
    accuracy,
    brier_score,
    check_predictions,
    expected_calibration_error,
    misclassification_auroc,
    negative_log_likelihood,
    reliability_curve,
    top_label,
)
from bmoe_lightning.metrics.plotting import draw_reliability_curve, new_axes
from bmoe_lightning.metrics.selective import selective_risk

__all__ = [
    "METRIC_NAMES",
    "Accuracy",
    "BinConvention",
    "BrierScore",
    "CalibrationNorm",
    "Estimate",
    "ExpectedCalibrationError",
    "Interval",
    "MetricName",
    "NegativeLogLikelihood",
    "ReliabilityCurve",
    "ReliabilityDiagram",
    "accuracy",
    "bootstrap_interval",
    "brier_score",
    "calibration_metrics",
    "calibration_resamples",
    "calibration_summary",
    "calibration_values",
    "check_predictions",
    "draw_reliability_curve",
    "expected_calibration_error",
    "misclassification_auroc",
    "negative_log_likelihood",
    "new_axes",
    "percentile_interval",
    "reliability_curve",
    "selective_risk",
    "top_label",
]
