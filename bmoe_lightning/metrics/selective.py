"""Selective prediction: the errors among the most confident examples.

El-Yaniv and Wiener 2010 (https://jmlr.org/papers/v11/el-yaniv10a.html); for neural networks Geifman and El-Yaniv 2017
(https://arxiv.org/abs/1705.08500). Examples are answered from the most confident down; examples of equal confidence
count with their mean error, the expectation over their order, so no result depends on the order of the data. With k of
N examples answered, coverage is k / N and the (selective) risk is the share of errors among them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bmoe_lightning.metrics.base import OverAllExamples, WeightedValue, once
from bmoe_lightning.metrics.inputs import check_predictions
from bmoe_lightning.metrics.ranking import Groups, before, grouped
from bmoe_lightning.metrics.spec import over_all_examples

# Keeps a product such as 0.07 * 100 = 7.000000000000001 from answering one more, or one less.
_ROUNDING = 1e-9


def selective_risk(log_probs: Tensor, target: Tensor, coverages: Sequence[float]) -> Tensor:
    """Error rate among the most confident fraction of the examples.

    At coverage c the `ceil(c N)` most confident examples are answered.

    Args:
        log_probs: Normalised natural log-probabilities, `[N, K]`.
        target: Class indices, `[N]`.
        coverages: Fractions in (0, 1].

    Returns:
        Error rates `[len(coverages)]`, float64 in [0, 1].

    Raises:
        TypeError: If a tensor has the wrong dtype; see `check_predictions`.
        ValueError: If the predictions are refused, see `check_predictions`, or a coverage is out of range.
    """
    fractions = torch.tensor(list(coverages), dtype=torch.float64)
    if not bool(((fractions > 0) & (fractions <= 1)).all()):
        raise ValueError(f"coverages must lie in (0, 1], found {list(coverages)}")
    log_probs, target = check_predictions(log_probs, target)
    groups, error = _ranked_errors(log_probs, target)
    size, errors = groups.sums(torch.stack([torch.ones_like(error), error]))
    cumulative = (errors / size).repeat_interleave(size.long()).cumsum(0)
    answered = torch.ceil(fractions * len(target) - _ROUNDING).long().clamp(min=1).to(cumulative.device)
    return cumulative[answered - 1] / answered


def area_under_risk_coverage(log_probs: Tensor, target: Tensor) -> Tensor:
    """AURC: mean of the selective risk over the coverages 1/N, 2/N, ..., 1.

    It falls with the error rate as well as with a better order of the examples.

    Args:
        log_probs: Normalised natural log-probabilities, `[N, K]`.
        target: Class indices, `[N]`.

    Returns:
        A float64 scalar in [0, 1]; the error rate if confidences are all equal.

    Raises:
        TypeError: If a tensor has the wrong dtype; see `check_predictions`.
        ValueError: If the predictions are refused; see `check_predictions`.
    """
    return once(_aurc, *check_predictions(log_probs, target))


def excess_area_under_risk_coverage(log_probs: Tensor, target: Tensor) -> Tensor:
    """E-AURC: the AURC above that of the best order, which has all errors last.

    Geifman, Uziel and El-Yaniv 2019 (https://arxiv.org/abs/1805.08206).

    Args:
        log_probs: Normalised natural log-probabilities, `[N, K]`.
        target: Class indices, `[N]`.

    Returns:
        A float64 scalar in [0, 1]; 0 if no right answer is less confident than a wrong one.

    Raises:
        TypeError: If a tensor has the wrong dtype; see `check_predictions`.
        ValueError: If the predictions are refused; see `check_predictions`.
    """
    return once(_excess_aurc, *check_predictions(log_probs, target))


def area_under_generalised_risk_coverage(log_probs: Tensor, target: Tensor) -> Tensor:
    """AUGRC: area under coverage times risk, the share of all examples that are answered and wrong.

    Traub et al. 2024 (https://arxiv.org/abs/2407.01032), by the trapezoidal rule from coverage 0. It equals
    `a (1 - a) (1 - AUROC) + (1 - a)^2 / 2` with accuracy a and the AUROC of errors; AURC gives the first few examples
    most of the weight, AUGRC does not.

    Args:
        log_probs: Normalised natural log-probabilities, `[N, K]`.
        target: Class indices, `[N]`.

    Returns:
        A float64 scalar in [0, 1/2]; half the error rate if confidences are all equal.

    Raises:
        TypeError: If a tensor has the wrong dtype; see `check_predictions`.
        ValueError: If the predictions are refused; see `check_predictions`.
    """
    return once(_augrc, *check_predictions(log_probs, target))


def coverage_at_risk(log_probs: Tensor, target: Tensor, *, risk: float = 0.05) -> Tensor:
    """Largest coverage whose selective risk is at most `risk`; 0 if there is none.

    Args:
        log_probs: Normalised natural log-probabilities, `[N, K]`.
        target: Class indices, `[N]`.
        risk: Error rate that is accepted, in [0, 1].

    Returns:
        A float64 scalar, a multiple of 1/N in [0, 1].

    Raises:
        TypeError: If a tensor has the wrong dtype; see `check_predictions`.
        ValueError: If the predictions are refused, see `check_predictions`, or `risk` is out of range.
    """
    _check_risk(risk)
    return once(_coverage(risk), *check_predictions(log_probs, target))


class AreaUnderRiskCoverage(OverAllExamples):
    """Mean selective risk over all coverages (AURC); the torchmetrics class of `area_under_risk_coverage`."""

    higher_is_better = False
    prefix = "aurc"

    def weighted(self, log_probs: Tensor, target: Tensor) -> WeightedValue:
        """The AURC as a function of multiplicities; see `OverAllExamples`."""
        return _aurc(log_probs, target)


class ExcessAreaUnderRiskCoverage(OverAllExamples):
    """AURC above the best possible (E-AURC); the torchmetrics class of `excess_area_under_risk_coverage`."""

    higher_is_better = False
    prefix = "e_aurc"

    def weighted(self, log_probs: Tensor, target: Tensor) -> WeightedValue:
        """The E-AURC as a function of multiplicities; see `OverAllExamples`."""
        return _excess_aurc(log_probs, target)


class AreaUnderGeneralisedRiskCoverage(OverAllExamples):
    """Area under coverage times risk (AUGRC); the class of `area_under_generalised_risk_coverage`."""

    higher_is_better = False
    plot_upper_bound = 0.5
    prefix = "augrc"

    def weighted(self, log_probs: Tensor, target: Tensor) -> WeightedValue:
        """The AUGRC as a function of multiplicities; see `OverAllExamples`."""
        return _augrc(log_probs, target)


class CoverageAtRisk(OverAllExamples):
    """Largest coverage whose selective risk is at most `risk`; the torchmetrics class of `coverage_at_risk`.

    Args:
        risk: Error rate that is accepted, in [0, 1].
        kwargs: Passed on to `torchmetrics.Metric`.

    Raises:
        ValueError: If `risk` is out of range.
    """

    higher_is_better = True
    prefix = "coverage_at_risk"

    def __init__(self, risk: float = 0.05, **kwargs: Any) -> None:
        _check_risk(risk)
        super().__init__(**kwargs)
        self.risk = risk

    def weighted(self, log_probs: Tensor, target: Tensor) -> WeightedValue:
        """The coverage as a function of multiplicities; see `OverAllExamples`."""
        return _coverage(self.risk)(log_probs, target)


def _check_risk(risk: float) -> None:
    if not 0.0 <= risk <= 1.0:
        raise ValueError(f"risk must lie in [0, 1], found {risk}")


def _ranked_errors(log_probs: Tensor, target: Tensor) -> tuple[Groups, Tensor]:
    # Log-probabilities, not probabilities: those of very confident examples would all be rounded to 1.
    score, predicted = log_probs.max(dim=1)
    return grouped(-score), (predicted != target).double()


def _sizes_and_errors(log_probs: Tensor, target: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """From multiplicities `[R, N]` to the sizes and errors `[R, G]` of the groups, the most confident first."""
    groups, error = _ranked_errors(log_probs, target)
    return lambda weights: (groups.sums(weights), groups.sums(weights * error))


def _sum_of_risks(size: Tensor, errors: Tensor) -> Tensor:
    """Sum of the risks at all coverages, `[R]`, from sizes and errors of groups `[R, G]`.

    In a group of size w with error rate e, after n answers of which E are wrong, the risks are `(E + j e) / (n + j)`,
    j = 1 ... w; their sum is `w e + (E - n e) (H(n + w) - H(n))` with the harmonic numbers H.
    """
    total = int(size.sum(1).max())
    reciprocals = 1 / torch.arange(1, total + 1, dtype=torch.float64, device=size.device)
    harmonic = torch.cat([reciprocals.new_zeros(1), reciprocals.cumsum(0)])
    answered, wrong, rate = before(size), before(errors), errors / size.clamp(min=1)
    steps = harmonic[(answered + size).long()] - harmonic[answered.long()]
    return (errors + (wrong - answered * rate) * steps).sum(1)


def _aurc(log_probs: Tensor, target: Tensor) -> WeightedValue:
    of_groups = _sizes_and_errors(log_probs, target)

    def value(weights: Tensor) -> Tensor:
        size, errors = of_groups(weights)
        return _sum_of_risks(size, errors) / size.sum(1)

    return value


def _excess_aurc(log_probs: Tensor, target: Tensor) -> WeightedValue:
    of_groups = _sizes_and_errors(log_probs, target)

    def value(weights: Tensor) -> Tensor:
        size, errors = of_groups(weights)
        number, wrong = size.sum(1), errors.sum(1)
        best = _sum_of_risks(torch.stack([number - wrong, wrong], 1), torch.stack([torch.zeros_like(wrong), wrong], 1))
        return ((_sum_of_risks(size, errors) - best) / number).clamp(min=0)

    return value


def _augrc(log_probs: Tensor, target: Tensor) -> WeightedValue:
    of_groups = _sizes_and_errors(log_probs, target)

    def value(weights: Tensor) -> Tensor:
        size, errors = of_groups(weights)
        return (size * (before(errors) + errors / 2)).sum(1) / size.sum(1).square()

    return value


def _coverage(risk: float) -> Callable[[Tensor, Tensor], WeightedValue]:
    def weighted(log_probs: Tensor, target: Tensor) -> WeightedValue:
        of_groups = _sizes_and_errors(log_probs, target)

        def value(weights: Tensor) -> Tensor:
            size, errors = of_groups(weights)
            answered, wrong, rate = before(size), before(errors), errors / size.clamp(min=1)
            # Within a group (wrong + j rate) <= risk (answered + j) is linear in j.
            slack = risk * answered - wrong
            rising = torch.floor(slack / (rate - risk) + _ROUNDING).clamp(min=0)
            last = torch.where(slack + risk * size - errors >= -_ROUNDING, size, 0)
            taken = torch.where(rate > risk, torch.minimum(rising, size), last)
            return torch.where(taken > 0, answered + taken, 0).amax(1) / size.sum(1)

        return value

    return weighted


SPECS = (
    over_all_examples(
        "aurc",
        "AURC",
        lambda binning: AreaUnderRiskCoverage(),  # noqa: ARG005
        definition="mean error rate of the k most confident examples over k = 1 ... N, ties averaged",
    ),
    over_all_examples(
        "e_aurc",
        "E-AURC",
        lambda binning: ExcessAreaUnderRiskCoverage(),  # noqa: ARG005
        definition="AURC less that of the order with all errors last",
    ),
    over_all_examples(
        "augrc",
        "AUGRC",
        lambda binning: AreaUnderGeneralisedRiskCoverage(),  # noqa: ARG005
        definition="area under the share of examples that are answered and wrong, over coverage; trapezoidal, "
        "ties averaged",
        upper=0.5,
    ),
    over_all_examples(
        "coverage_at_risk",
        "Cov@5%",
        lambda binning: CoverageAtRisk(),  # noqa: ARG005
        definition="largest share of examples, the most confident first, whose error rate is at most 5 %; "
        "0 if there is none",
    ),
)
