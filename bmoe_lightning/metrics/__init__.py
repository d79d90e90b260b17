"""Calibration metrics from log-probabilities: functions, torchmetrics classes, and bootstrap intervals."""

from bmoe_lightning.metrics.acc import Accuracy, accuracy
from bmoe_lightning.metrics.adaptive_ece import AdaptiveCalibrationError, adaptive_calibration_error
from bmoe_lightning.metrics.binning import BinConvention, Binning
from bmoe_lightning.metrics.bootstrap import Estimate, Interval, calibration_resamples, centred_interval
from bmoe_lightning.metrics.brier import BrierScore, brier_score
from bmoe_lightning.metrics.calibration import (
    HEADLINE_METRICS,
    METRIC_NAMES,
    METRICS,
    calibration_metrics,
    calibration_values,
    get_metric,
)
from bmoe_lightning.metrics.classwise_ece import ClasswiseCalibrationError, classwise_calibration_error
from bmoe_lightning.metrics.conformal import (
    ConformalScore,
    PredictionSets,
    SetCoverage,
    SetSize,
    SizeAndCoverage,
    conformal_threshold,
    cross_fitted_sets,
    prediction_sets,
)
from bmoe_lightning.metrics.detection import (
    ErrorAUPR,
    ErrorAUROC,
    ErrorFPR95,
    FalsePositiveRateAt95,
    detection_metrics,
    detection_values,
    unit_ranks,
)
from bmoe_lightning.metrics.ece import CalibrationNorm, ExpectedCalibrationError, expected_calibration_error
from bmoe_lightning.metrics.inputs import check_log_probs, check_predictions, top_label
from bmoe_lightning.metrics.nll import NegativeLogLikelihood, negative_log_likelihood
from bmoe_lightning.metrics.out_of_distribution import detect_errors, detect_out_of_distribution
from bmoe_lightning.metrics.plotting import draw_reliability_curve, new_axes, new_figure
from bmoe_lightning.metrics.refinement import (
    NLLCalibration,
    NLLRefinement,
    NLLSplit,
    negative_log_likelihood_split,
)
from bmoe_lightning.metrics.rejection import (
    prediction_rejection_ratio,
    rejection_ratio_interval,
    weighted_rejection_ratio,
)
from bmoe_lightning.metrics.reliability import ReliabilityCurve, ReliabilityDiagram, reliability_curve
from bmoe_lightning.metrics.selective import (
    AreaUnderGeneralisedRiskCoverage,
    AreaUnderRiskCoverage,
    CoverageAtRisk,
    ExcessAreaUnderRiskCoverage,
    area_under_generalised_risk_coverage,
    area_under_risk_coverage,
    coverage_at_risk,
    excess_area_under_risk_coverage,
    selective_risk,
)
from bmoe_lightning.metrics.smooth_ece import SmoothCalibrationError, smooth_calibration_error
from bmoe_lightning.metrics.spec import MetricSpec, Resamples

__all__ = [
    "HEADLINE_METRICS",
    "METRICS",
    "METRIC_NAMES",
    "Accuracy",
    "AdaptiveCalibrationError",
    "AreaUnderGeneralisedRiskCoverage",
    "AreaUnderRiskCoverage",
    "BinConvention",
    "Binning",
    "BrierScore",
    "CalibrationNorm",
    "ClasswiseCalibrationError",
    "ConformalScore",
    "CoverageAtRisk",
    "ErrorAUPR",
    "ErrorAUROC",
    "ErrorFPR95",
    "Estimate",
    "ExcessAreaUnderRiskCoverage",
    "ExpectedCalibrationError",
    "FalsePositiveRateAt95",
    "Interval",
    "MetricSpec",
    "NLLCalibration",
    "NLLRefinement",
    "NLLSplit",
    "NegativeLogLikelihood",
    "PredictionSets",
    "ReliabilityCurve",
    "ReliabilityDiagram",
    "Resamples",
    "SetCoverage",
    "SetSize",
    "SizeAndCoverage",
    "SmoothCalibrationError",
    "accuracy",
    "adaptive_calibration_error",
    "area_under_generalised_risk_coverage",
    "area_under_risk_coverage",
    "brier_score",
    "calibration_metrics",
    "calibration_resamples",
    "calibration_values",
    "centred_interval",
    "check_log_probs",
    "check_predictions",
    "classwise_calibration_error",
    "conformal_threshold",
    "coverage_at_risk",
    "cross_fitted_sets",
    "detect_errors",
    "detect_out_of_distribution",
    "detection_metrics",
    "detection_values",
    "draw_reliability_curve",
    "excess_area_under_risk_coverage",
    "expected_calibration_error",
    "get_metric",
    "negative_log_likelihood",
    "negative_log_likelihood_split",
    "new_axes",
    "new_figure",
    "prediction_rejection_ratio",
    "prediction_sets",
    "rejection_ratio_interval",
    "reliability_curve",
    "selective_risk",
    "smooth_calibration_error",
    "top_label",
    "unit_ranks",
    "weighted_rejection_ratio",
]
