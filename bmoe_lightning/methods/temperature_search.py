"""One temperature that all logits are divided by, fitted on held-out labels: the search that several methods share."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

TEMPERATURE_RANGE = (0.01, 100.0)
"""Temperatures that are looked at."""

_GRID = 201
_GOLDEN = (math.sqrt(5) - 1) / 2


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Minimise `sum_n NLL(softmax(f_n / T))` over log T.

    In 1 / T the loss is convex, so in log T it has a single valley: a grid finds it and golden sections go to its
    bottom.

    Args:
        logits: `[N, K]`, `-inf` for absent classes; log-probabilities serve as well.
        labels: `[N]` int64.

    Returns:
        T in `TEMPERATURE_RANGE`. At an end of the range a warning says so: the labels then do not bound T (all of them
        right, or no better than chance).

    Raises:
        ValueError: for no examples, shapes that do not match, a value that is NaN or +inf, or a label of an absent
            class.
    """
    logits, labels = check_labelled(logits, labels)
    if len(labels) == 0:
        raise ValueError("a temperature cannot be fitted on no examples: the calibration split is empty")
    low, high = math.log(TEMPERATURE_RANGE[0]), math.log(TEMPERATURE_RANGE[1])
    log_temperature = minimise(lambda u: negative_log_likelihood(logits, labels, u), low, high)
    if min(log_temperature - low, high - log_temperature) < 1e-6:
        warnings.warn(
            f"the fitted temperature {math.exp(log_temperature):.3g} is at the end of what is searched: {len(labels)} "
            "labels, all answered right or answered no better than by chance, do not determine it",
            UserWarning,
            stacklevel=2,
        )
    return math.exp(log_temperature)


def negative_log_likelihood(logits: Tensor, labels: Tensor, log_temperature: Tensor) -> Tensor:
    """`sum_n NLL(softmax(f_n / T))` at several temperatures: logits `[N, K]`, labels `[N]`, log T `[G]` to `[G]`."""
    scaled = logits / log_temperature.exp().view(-1, 1, 1)
    chosen = labels.view(1, -1, 1).expand(len(log_temperature), -1, 1)
    return -scaled.log_softmax(-1).gather(2, chosen).sum((1, 2))


def minimise(objective: Callable[[Tensor], Tensor], low: float, high: float) -> float:
    """Minimise a function of one number: the best point of a grid, then golden sections between its neighbours.

    Args:
        objective: maps points `[G]` float64 to values `[G]`.
        low: left end.
        high: right end.
    """
    grid = torch.linspace(low, high, _GRID, dtype=torch.float64)
    # Points one at a time: all at once would hold the whole data set once a point.
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
    """Refuse what is no temperature.

    Raises:
        ValueError: if it is not positive and finite.
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"a temperature must be positive and finite, got {temperature}")
    return float(temperature)


def check_labelled(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Check calibration data, and bring them to the CPU in float64 and int64.

    Args:
        logits: `[N, K]`, `-inf` for absent classes.
        labels: `[N]`.

    Raises:
        ValueError: for shapes that do not match, a value that is NaN or +inf, or a label of an absent class.
    """
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"calibration needs logits [N, K] and labels [N], got {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    logits, labels = logits.detach().double().cpu(), labels.detach().long().cpu()
    if bool((torch.isnan(logits) | (logits == torch.inf)).any()):
        raise ValueError("calibration logits hold NaN or +inf: the model's weights or its input are broken")
    if bool(((labels < 0) | (labels >= logits.shape[1])).any()):
        raise ValueError(
            f"calibration labels must lie in 0 .. {logits.shape[1] - 1}, got {sorted(set(labels.tolist()))}"
        )
    absent = (logits.gather(1, labels.unsqueeze(1)) == -torch.inf).squeeze(1)
    if bool(absent.any()):
        raise ValueError(
            f"{int(absent.sum())} calibration labels name a class that their example does not have (a logit of -inf), "
            f"the first is example {int(absent.nonzero()[0])}"
        )
    return logits, labels
