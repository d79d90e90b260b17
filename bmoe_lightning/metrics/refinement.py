"""The NLL split into calibration and refinement.

A proper score is the sum of what a recalibration could remove (calibration) and of what it could not (refinement;
Bröcker 2009, https://doi.org/10.1002/qj.456). Here the recalibration is one temperature, as in Berta et al. 2025
(https://arxiv.org/abs/2501.19195): refinement is the NLL after the best temperature, which for each example is fitted
on all others (cross-fitting), and calibration the rest. So refinement compares what methods know about single examples,
with the number that temperature scaling would fit taken out.

There are as many folds as examples and not five, since five random folds alone move the refinement of 500 examples by
.004 nats, as much as methods differ by. Leaving out is exact and no Newton step from the temperature of all examples:
one wrong answer among right ones moves the temperature too far for that. It costs little, since every sum of slopes
without an example is read off one table of slopes by temperature.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bmoe_lightning.metrics.base import OverAllExamples, WeightedValue
from bmoe_lightning.metrics.inputs import check_predictions
from bmoe_lightning.metrics.spec import over_all_examples

_RANGE = (0.01, 100.0)
# Cubic interpolation in log(1/T) between these finds 1/T to about 1e-9 of it.
_NODES = 513
_HALVINGS = 36
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
    losses = _Losses.of(log_probs, target)

    def of_chunk(weights: Tensor) -> NLLSplit:
        after, before = losses.at(losses.without_each(weights)), -losses.label
        # A label of probability zero has it at any temperature: its loss is no matter of calibration.
        gain = torch.where(after.isinf(), 0, before - after)
        number = weights.sum(1)
        refinement = torch.where(weights > 0, weights * after, 0).sum(1) / number
        return NLLSplit((weights * gain).sum(1) / number, refinement)

    parts = [of_chunk(chunk) for chunk in weights.split(max(1, _CHUNK // log_probs.numel()))]
    return NLLSplit(*(torch.cat(part) for part in zip(*parts, strict=True)))


@dataclass(frozen=True, eq=False)
class _Losses:
    """NLL of each example as a function of the inverse temperature b, with a table of its derivatives in b.

    Attributes:
        log_probs: Log-probabilities `[N, K]`.
        label: Those of the labels, `[N]`.
        nodes: Inverse temperatures of the table `[G]`, equally spaced in their logarithm.
        slopes: First derivatives `[N, G]`.
        curvatures: Second derivatives `[N, G]`.
    """

    log_probs: Tensor
    label: Tensor
    nodes: Tensor
    slopes: Tensor
    curvatures: Tensor

    @classmethod
    def of(cls, log_probs: Tensor, target: Tensor) -> _Losses:
        label = log_probs.gather(1, target[:, None]).squeeze(1)
        low, high = (math.log(end) for end in _RANGE)
        nodes = torch.linspace(low, high, _NODES, dtype=torch.float64, device=log_probs.device).exp()
        parts = [_derivatives(log_probs, label, b) for b in nodes.split(max(1, _CHUNK // log_probs.numel()))]
        slopes, curvatures = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        return cls(log_probs, label, nodes, slopes, curvatures)

    def at(self, inverse: Tensor) -> Tensor:
        """NLL at inverse temperatures `[R, N]`: `[R, N]`."""
        return torch.logsumexp(inverse[..., None] * self.log_probs, -1) - inverse * self.label

    def without_each(self, weights: Tensor) -> Tensor:
        """Inverse temperatures `[R, N]` that minimise the penalised loss without each example, all its copies."""
        total = weights @ self.slopes + self.nodes - 1
        example = torch.arange(len(self.label), device=weights.device)

        def slope(node: Tensor) -> Tensor:
            return total.gather(1, node) - weights * self.slopes[example, node]

        first = torch.zeros_like(weights, dtype=torch.int64)
        last = torch.full_like(first, _NODES - 1)
        # The slope increases, so that halving finds the two nodes between which it crosses zero.
        for _ in range((_NODES - 1).bit_length()):
            middle = (first + last) // 2
            below = slope(middle) < 0
            first, last = torch.where(below, middle, first), torch.where(below, last, middle)
        last = first + 1

        bends = weights @ self.curvatures + 1
        spacing = math.log(_RANGE[1] / _RANGE[0]) / (_NODES - 1)

        def bend(node: Tensor) -> Tensor:
            return spacing * self.nodes[node] * (bends.gather(1, node) - weights * self.curvatures[example, node])

        place = _crossing(slope(first), slope(last), bend(first), bend(last))
        return self.nodes[first] * (spacing * place).exp()


def _crossing(start: Tensor, end: Tensor, start_derivative: Tensor, end_derivative: Tensor) -> Tensor:
    """Where the cubics of these values and derivatives at 0 and 1 cross zero; the nearer end if they do not."""
    square = 3 * (end - start) - 2 * start_derivative - end_derivative
    cube = 2 * (start - end) + start_derivative + end_derivative
    low, high = torch.zeros_like(start), torch.ones_like(start)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        below = start + middle * (start_derivative + middle * (square + middle * cube)) < 0
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def _derivatives(log_probs: Tensor, label: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """First and second derivatives `[N, G]` of the losses at inverse temperatures `[G]`."""
    finite = torch.where(log_probs == -torch.inf, 0, log_probs)[:, None]
    probabilities = torch.softmax(inverse[:, None] * log_probs[:, None], -1)
    mean = (probabilities * finite).sum(-1)
    variance = (probabilities * (finite - mean[..., None]).square()).sum(-1)
    impossible = (label == -torch.inf)[:, None]
    return torch.where(impossible, 0, mean - label[:, None]), torch.where(impossible, 0, variance)


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
