"""The NLL split into calibration and refinement.

A proper score is the sum of what a recalibration could remove (calibration) and of what it could not (refinement;
Bröcker 2009, https://doi.org/10.1002/qj.456). Here the recalibration is one temperature, as in Berta et al. 2025
(https://arxiv.org/abs/2501.19195): refinement is the NLL after the best temperature, which for each example is fitted
on all others (cross-fitting), and calibration the rest. So refinement compares what methods know about single examples,
with the number that temperature scaling would fit taken out.

There are as many folds as examples and not five, since five random folds alone move the refinement of 500 examples by
.004 nats, as much as methods differ by. The temperature without an example is one Newton step from that of all
examples (approximate leave-one-out), which differs from the exact one by less than 1e-4 nats with 200 examples.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bmoe_lightning.metrics.base import OverAllExamples, WeightedValue
from bmoe_lightning.metrics.inputs import check_predictions
from bmoe_lightning.metrics.spec import over_all_examples

_RANGE = (0.01, 100.0)
_STEPS = 100
# Floats of a chunk of resamples x examples x classes.
_CHUNK = 4_000_000


class NLLSplit(NamedTuple):
    """The two parts of the NLL, which add up to it.

    Attributes:
        calibration: NLL that the best temperature removes; a float64 scalar, negative if it does harm.
        refinement: NLL after the best temperature, a float64 scalar.
    """

    calibration: Tensor
    refinement: Tensor


def negative_log_likelihood_split(log_probs: Tensor, target: Tensor) -> NLLSplit:
    """Split the NLL into what a temperature removes and the rest.

    The temperature of an example minimises the summed NLL of all others plus `(1/T - 1)^2 / 2`, a penalty that keeps T
    finite where few examples are answered wrong, and vanishes against a hundred of them; 1/T lies in [.01, 100]. A
    single example keeps its temperature.

    Args:
        log_probs: Normalised natural log-probabilities, `[N, K]`.
        target: Class indices, `[N]`.

    Raises:
        TypeError: If a tensor has the wrong dtype; see `check_predictions`.
        ValueError: If the predictions are refused; see `check_predictions`.
    """
    log_probs, target = check_predictions(log_probs.detach(), target)
    ones = torch.ones(1, len(target), dtype=torch.float64, device=log_probs.device)
    calibration, refinement = _split(log_probs, target, ones)
    return NLLSplit(calibration[0], refinement[0])


class NLLCalibration(OverAllExamples):
    """NLL that the best temperature removes; a torchmetrics class of `negative_log_likelihood_split`."""

    higher_is_better = False
    plot_lower_bound = None
    plot_upper_bound = None
    prefix = "nll_calibration"

    def weighted(self, log_probs: Tensor, target: Tensor) -> WeightedValue:
        """The calibration as a function of multiplicities; all copies of an example are left out together."""
        return lambda weights: _split(log_probs, target, weights).calibration


class NLLRefinement(OverAllExamples):
    """NLL after the best temperature; a torchmetrics class of `negative_log_likelihood_split`."""

    higher_is_better = False
    plot_upper_bound = None
    prefix = "nll_refinement"

    def weighted(self, log_probs: Tensor, target: Tensor) -> WeightedValue:
        """The refinement as a function of multiplicities; all copies of an example are left out together."""
        return lambda weights: _split(log_probs, target, weights).refinement


def _split(log_probs: Tensor, target: Tensor, weights: Tensor) -> NLLSplit:
    """Both parts `[R]` with multiplicities `[R, N]`."""
    losses = _Losses(log_probs, target)

    def of_chunk(weights: Tensor) -> NLLSplit:
        after, before = losses.at(losses.without_each(weights)), -losses.label
        # A label of probability zero has it at any temperature: its loss is no matter of calibration.
        gain = torch.where(after.isinf(), 0, before - after)
        number = weights.sum(1)
        refinement = torch.where(weights > 0, weights * after, 0).sum(1) / number
        return NLLSplit((weights * gain).sum(1) / number, refinement)

    parts = [of_chunk(chunk) for chunk in weights.split(max(1, _CHUNK // log_probs.numel()))]
    return NLLSplit(*(torch.cat(part) for part in zip(*parts, strict=True)))


class _Losses:
    """NLL of each example as a function of the inverse temperature b, and its minimum over sums of examples."""

    def __init__(self, log_probs: Tensor, target: Tensor) -> None:
        self.log_probs = log_probs
        self.finite = torch.where(log_probs == -torch.inf, 0, log_probs)
        self.label = log_probs.gather(1, target[:, None]).squeeze(1)

    def at(self, inverse: Tensor) -> Tensor:
        """NLL at inverse temperatures `[R, N]`: `[R, N]`."""
        return torch.logsumexp(inverse[..., None] * self.log_probs, -1) - inverse * self.label

    def fit(self, weights: Tensor) -> Tensor:
        """Inverse temperatures `[R]` that minimise the penalised loss with weights `[R, N]`: Newton in a bracket."""
        low, high = (weights.new_full((len(weights),), end) for end in _RANGE)
        inverse = torch.ones_like(low)
        for _ in range(_STEPS):
            slopes, curvatures = self._derivatives(weights, inverse)
            slope = slopes.sum(1) + inverse - 1
            low, high = torch.where(slope < 0, inverse, low), torch.where(slope > 0, inverse, high)
            step = inverse - slope / (curvatures.sum(1) + 1)
            step = torch.where((step > low) & (step < high), step, (low + high) / 2)
            step = torch.where(slope == 0, inverse, step)
            moved = (step - inverse).abs() / inverse
            inverse = step
            if bool((moved <= 1e-10).all()):  # which Newton's method squares
                break
        return inverse

    def without_each(self, weights: Tensor) -> Tensor:
        """Inverse temperatures `[R, N]` without each example, all its copies: one Newton step from those of all."""
        inverse = self.fit(weights)
        slopes, curvatures = self._derivatives(weights, inverse)
        rest = curvatures.sum(1, keepdim=True) + 1 - curvatures
        return (inverse[:, None] + slopes / rest).clamp(*_RANGE)

    def _derivatives(self, weights: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted first and second derivatives `[R, N]` of the losses at inverse temperatures `[R]`."""
        probabilities = torch.softmax(inverse[:, None, None] * self.log_probs, -1)
        mean = (probabilities * self.finite).sum(-1)
        variance = ((probabilities * self.finite.square()).sum(-1) - mean.square()).clamp(min=0)
        slope = torch.where(self.label == -torch.inf, 0, mean - self.label)
        return weights * slope, weights * torch.where(self.label == -torch.inf, 0, variance)


SPECS = (
    over_all_examples(
        "nll_calibration",
        "NLL calibration",
        lambda binning: NLLCalibration(),  # noqa: ARG005
        definition="NLL that one temperature removes, fitted for each example on all others; negative if it does harm",
        lower=-torch.inf,
        upper=torch.inf,
    ),
    over_all_examples(
        "nll_refinement",
        "NLL refinement",
        lambda binning: NLLRefinement(),  # noqa: ARG005
        definition="NLL after that temperature: NLL = calibration + refinement",
        upper=torch.inf,
    ),
)
