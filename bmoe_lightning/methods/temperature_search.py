"""The fit of a temperature on held-out labels, which several methods share."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from bmoe_lightning.experts.logits_contract import checked_labels, masked_logits
from bmoe_lightning.utils.fit_warnings import warn_of_fit

TEMPERATURE_RANGE = (0.01, 100.0)
"""Search range of the temperature."""

_LOG_RANGE = (math.log(TEMPERATURE_RANGE[0]), math.log(TEMPERATURE_RANGE[1]))
_GRID = 201
_GOLDEN = (math.sqrt(5) - 1) / 2


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Minimise `sum_n NLL(softmax(f_n / T))` over log T.

    The loss is convex in 1 / T, hence unimodal in log T: a grid search brackets the minimum, and golden-section search
    refines it. Temperature scaling: Guo et al. 2017 (https://arxiv.org/abs/1706.04599).

    Args:
        logits: Logits or log-probabilities `[N, K]`, `-inf` for absent classes.
        labels: Labels `[N]` int64.

    Returns:
        T in `TEMPERATURE_RANGE`; 1 if the likelihood does not depend on it.

    Raises:
        ValueError: If there are no examples, shapes do not match, a value is NaN or +inf, or a label is that of an
            absent class.

    Warns:
        FitWarning: If T is at an end of the range, since the predictions are all correct or no better than chance, or
            if the likelihood does not depend on T.
    """
    logits, labels = check_labelled(logits, labels)
    if len(labels) == 0:
        raise ValueError(
            "a temperature cannot be fitted without examples: the calibration split is empty; add labelled examples"
        )
    low, high = _LOG_RANGE
    if is_independent_of_temperature(logits, labels):
        warn_of_fit(
            f"the likelihood of the {len(labels)} labels does not depend on the temperature (every example's logits "
            "are constant), so it is left at 1; check the model",
            stacklevel=2,
        )
        return 1.0
    log_temperature = minimise(lambda u: negative_log_likelihood(logits, labels, u), low, high)
    if is_at_end(log_temperature, low, high):
        warn_of_fit(
            f"the fitted temperature {math.exp(log_temperature):.3g} is at the end of the search range: {len(labels)} "
            "labels do not determine it (all predictions are correct, or no better than chance); add labels",
            stacklevel=2,
        )
    return math.exp(log_temperature)


def is_independent_of_temperature(logits: Tensor, labels: Tensor) -> bool:
    """Whether the likelihood of labels `[N]` is the same at all temperatures, for logits `[N, K]`."""
    probed = torch.tensor([_LOG_RANGE[0], 0.0, _LOG_RANGE[1]], dtype=torch.float64)
    values = torch.cat([negative_log_likelihood(logits, labels, point.view(1)) for point in probed])
    return float(values.max() - values.min()) <= 1e-9 * float(values.abs().max().clamp(min=1))


def is_at_end(log_temperature: float, low: float, high: float) -> bool:
    """Whether a minimum of `minimise` is within a grid step of an end of its range."""
    return min(log_temperature - low, high - log_temperature) < (high - low) / (_GRID - 1)


def negative_log_likelihood(logits: Tensor, labels: Tensor, log_temperature: Tensor) -> Tensor:
    """`sum_n NLL(softmax(f_n / T))`, `[G]`, for logits `[N, K]`, labels `[N]` and log temperatures `[G]`."""
    scaled = logits / log_temperature.exp().view(-1, 1, 1)
    chosen = labels.view(1, -1, 1).expand(len(log_temperature), -1, 1)
    return -scaled.log_softmax(-1).gather(2, chosen).sum((1, 2))


def minimise(objective: Callable[[Tensor], Tensor], low: float, high: float) -> float:
    """Minimise a unimodal function of one variable: a grid search, then golden-section search around its best point.

    Args:
        objective: Function from points `[G]` float64 to values `[G]`.
        low: Lower bound.
        high: Upper bound.
    """
    grid = torch.linspace(low, high, _GRID, dtype=torch.float64)
    # One point at a time: a batch of points would take a copy of the data set for each.
    values = torch.cat([objective(point.view(1)) for point in grid])
    best = int(values.argmin())
    left, right = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, _GRID - 1)])
    while right - left > 1e-9:
        first, second = right - _GOLDEN * (right - left), left + _GOLDEN * (right - left)
        at_first, at_second = objective(torch.tensor([first, second], dtype=torch.float64)).tolist()
        if at_first < at_second:
            right = second
        else:
            left = first
    return (left + right) / 2


def check_temperature(temperature: float) -> float:
    """Check a temperature.

    Raises:
        ValueError: If it is not positive and finite.
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"a temperature must be positive and finite, got {temperature}")
    return float(temperature)


def check_labelled(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Check calibration data, and convert them to float64 (`-inf` for absent classes) and int64 on the CPU.

    Args:
        logits: Logits `[N, K]`, `-inf` for absent classes.
        labels: Labels `[N]`.

    Raises:
        ValueError: If shapes do not match, a value is NaN or +inf, or a label is that of an absent class.
    """
    if logits.dim() != 2:
        raise ValueError(f"calibration needs logits [N, K], got {tuple(logits.shape)}")
    logits = logits.detach().double().cpu()
    if bool((torch.isnan(logits) | (logits == torch.inf)).any()):
        raise ValueError("calibration logits contain NaN or +inf; check the model's weights and inputs")
    labels = checked_labels(labels, logits).cpu()
    return (masked_logits(logits) if len(logits) else logits), labels
