"""Smooth calibration error, which has no bins.

Błasiok and Nakkiran 2023 (https://arxiv.org/abs/2309.12236): the residuals (correct - confidence) are smoothed over
confidence with a Gaussian kernel that is reflected at 0 and 1,

    r_s(t) = 1/N sum_n (correct_n - confidence_n) k_s(t, confidence_n),    smECE_s = integral of |r_s(t)| over [0, 1],

and the bandwidth s is that at which smECE_s = s. The reflected kernel multiplies the k-th cosine coefficient of the
residuals by `exp(-(pi k s)^2 / 2)`, so smoothing at any bandwidth is one inverse Fourier transform.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bmoe_lightning.metrics.base import OverAllExamples, WeightedValue, once
from bmoe_lightning.metrics.inputs import check_predictions, top_label
from bmoe_lightning.metrics.spec import over_all_examples

MIN_BANDWIDTH = 0.001
"""Smallest bandwidth, that of the authors' code; below it the result is the error at this bandwidth."""

# At the smallest bandwidth the last coefficient is multiplied by 1e-9; it is the number of grid intervals too.
_FREQUENCIES = 2048
_STEPS = 60
_TOLERANCE = 1e-10


def smooth_calibration_error(log_probs: Tensor, target: Tensor) -> Tensor:
    """Top-label smooth calibration error (smECE) at its fixed-point bandwidth.

    Args:
        log_probs: Normalised natural log-probabilities, `[N, K]`.
        target: Class indices, `[N]`.

    Returns:
        A float64 scalar in [0, 1].

    Raises:
        TypeError: If a tensor has the wrong dtype; see `check_predictions`.
        ValueError: If the predictions are refused; see `check_predictions`.
    """
    return once(_weighted, *check_predictions(log_probs, target))


class SmoothCalibrationError(OverAllExamples):
    """Top-label smooth calibration error (smECE); the torchmetrics class of `smooth_calibration_error`."""

    higher_is_better = False
    prefix = "smooth_ece"

    def weighted(self, log_probs: Tensor, target: Tensor) -> WeightedValue:
        """The error as a function of multiplicities; see `OverAllExamples`."""
        return _weighted(log_probs, target)


def _weighted(log_probs: Tensor, target: Tensor) -> WeightedValue:
    confidence, correct = top_label(log_probs, target)
    frequencies = math.pi * torch.arange(_FREQUENCIES + 1, dtype=torch.float64, device=confidence.device)
    waves = (correct - confidence)[:, None] * torch.cos(confidence[:, None] * frequencies)
    return lambda weights: _at_fixed_point(weights @ waves / weights.sum(1, keepdim=True), frequencies)


def _at_fixed_point(coefficients: Tensor, frequencies: Tensor) -> Tensor:
    """The value at the bandwidth that equals it, `[R]`, from mean cosine coefficients `[R, F + 1]`.

    The error falls with the bandwidth, so its difference to it has one zero, found by false position (Illinois).
    """
    low, high = (coefficients.new_full((len(coefficients),), end) for end in (MIN_BANDWIDTH, 1.0))
    at_low, at_high = (_error(coefficients, frequencies, end) - end for end in (low, high))
    smallest = at_low + low
    middle, found = low, at_low
    for _ in range(_STEPS):
        middle = (low * at_high - high * at_low) / (at_high - at_low)
        found = _error(coefficients, frequencies, middle) - middle
        if bool((found.abs() <= _TOLERANCE)[at_low > 0].all()):
            break
        above = found > 0
        # The end that stays is halved in value, or it would stay for ever.
        at_low, at_high = torch.where(above, found, at_low / 2), torch.where(above, at_high / 2, found)
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return torch.where(smallest > MIN_BANDWIDTH, found + middle, smallest)


def _error(coefficients: Tensor, frequencies: Tensor, bandwidth: Tensor) -> Tensor:
    """Integral of the absolute smoothed residual, `[R]`, by the trapezoidal rule."""
    smoothed = coefficients * torch.exp(-(frequencies * bandwidth[:, None]).square() / 2)
    # sum_k (2 - [k = 0]) c_k cos(pi k t) at t = j / F is an inverse transform of length 2 F; its last term counts once.
    values = torch.fft.irfft(smoothed.to(torch.complex128), n=2 * _FREQUENCIES, norm="forward")[:, : _FREQUENCIES + 1]
    magnitude = values.abs()
    return (magnitude.sum(1) - (magnitude[:, 0] + magnitude[:, -1]) / 2) / _FREQUENCIES


SPEC = over_all_examples(
    "smooth_ece",
    "Smooth ECE",
    lambda binning: SmoothCalibrationError(),  # noqa: ARG005
    definition="absolute gap between confidence and accuracy, smoothed by a reflected Gaussian kernel whose bandwidth "
    "equals the result",
)
