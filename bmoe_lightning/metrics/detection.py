"""How well a score tells two kinds of examples apart: AUROC, average precision (AUPR) and FPR95, by torchmetrics.

The score is an uncertainty, **higher is more uncertain**, and the positive class is what should be uncertain: a wrong
answer, or an out-of-distribution input. The direction is part of the definition and never found from data, so a score
that points the wrong way has an AUROC below .5.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import BinaryAUROC, BinaryAveragePrecision, BinarySpecificityAtSensitivity

from bmoe_lightning.metrics.base import OverAllExamples, WeightedValue
from bmoe_lightning.metrics.binning import Binning
from bmoe_lightning.metrics.ranking import grouped
from bmoe_lightning.metrics.spec import MetricSpec, over_all_examples

_SENSITIVITY = 0.95
_ROUNDING = 1e-9


class FalsePositiveRateAt95(BinarySpecificityAtSensitivity):
    """FPR95: the smallest false positive rate at a true positive rate of at least .95.

    Args:
        kwargs: Passed on to `torchmetrics.Metric`.
    """

    higher_is_better = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(min_sensitivity=_SENSITIVITY, **kwargs)

    def compute(self) -> Tensor:  # type: ignore[override]
        """The rate, a scalar."""
        specificity, _ = super().compute()
        return 1 - specificity


def detection_metrics() -> MetricCollection:
    """AUROC, AUPR and FPR95 as a torchmetrics collection, to be updated with scores in [0, 1] and 1 for positives.

    torchmetrics applies a sigmoid to scores outside of [0, 1], which makes ties of large ones; `unit_ranks` does not.
    """
    metrics: dict[str, Metric | MetricCollection] = {
        "auroc": BinaryAUROC(),
        "aupr": BinaryAveragePrecision(),
        "fpr95": FalsePositiveRateAt95(),
    }
    return MetricCollection(metrics, compute_groups=False)


DETECTION_NAMES = ("auroc", "aupr", "fpr95")
"""Names of the collection's metrics."""


def unit_ranks(score: Tensor) -> Tensor:
    """Scores replaced by their ranks, scaled to [0, 1]; equal scores have equal ranks.

    Args:
        score: Scores `[N]`, without NaN.
    """
    groups = grouped(score.double())
    return groups.index.double() / max(groups.number - 1, 1)


def detection_values(score: Tensor, positive: Tensor) -> dict[str, float]:
    """AUROC, AUPR and FPR95 of a score, by torchmetrics' classes.

    Args:
        score: Uncertainties `[N]`, higher is more uncertain.
        positive: Whether each example is of the positive class, `[N]`.

    Returns:
        Values by name; NaN if all examples are of one class.

    Raises:
        ValueError: If shapes differ or a score is NaN.
    """
    score, positive = check_scores(score, positive)
    if bool(positive.all()) or not bool(positive.any()):
        return dict.fromkeys(DETECTION_NAMES, torch.nan)
    metrics = detection_metrics()
    metrics.update(unit_ranks(score), positive.long())
    return {name: float(value) for name, value in metrics.compute().items()}


def check_scores(score: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """Check scores and classes, and convert them to float64 and bool on the CPU.

    Args:
        score: Uncertainties `[N]`.
        positive: Whether each example is of the positive class, `[N]`.

    Raises:
        ValueError: If shapes differ, there are no examples or a score is NaN.
    """
    if score.dim() != 1 or score.shape != positive.shape or not len(score):
        raise ValueError(
            f"expected scores [N] and classes [N] with N at least 1, found {list(score.shape)} and "
            f"{list(positive.shape)}"
        )
    if bool(score.isnan().any()):
        raise ValueError(f"{int(score.isnan().sum())} of {len(score)} scores are NaN; check the predictions")
    return score.detach().cpu().double(), positive.cpu().bool()


def weighted_detection(score: Tensor, positive: Tensor) -> dict[str, WeightedValue]:
    """The three values as functions of multiplicities, for resamples: torchmetrics takes no weights.

    Args:
        score: Uncertainties `[N]`.
        positive: Whether each example is of the positive class, `[N]`.
    """
    groups = grouped(-score)
    sign = positive.double()

    def rates(weights: Tensor) -> tuple[Tensor, Tensor]:
        return groups.sums(weights * sign), groups.sums(weights * (1 - sign))

    def auroc(weights: Tensor) -> Tensor:
        true, false = rates(weights)
        above = true.cumsum(1) - true / 2
        return (false * above).sum(1) / (true.sum(1) * false.sum(1))

    def aupr(weights: Tensor) -> Tensor:
        true, false = rates(weights)
        found, flagged = true.cumsum(1), (true + false).cumsum(1)
        value = (true * found / flagged.clamp(min=1)).sum(1) / true.sum(1)
        return torch.where(false.sum(1) > 0, value, torch.nan)

    def fpr95(weights: Tensor) -> Tensor:
        true, false = rates(weights)
        reached = true.cumsum(1) >= (_SENSITIVITY - _ROUNDING) * true.sum(1, keepdim=True)
        value = torch.where(reached, false.cumsum(1), torch.inf).amin(1) / false.sum(1)
        return torch.where(true.sum(1) > 0, value, torch.nan)

    return {"auroc": auroc, "aupr": aupr, "fpr95": fpr95}


class _ErrorDetection(OverAllExamples):
    name: str

    def weighted(self, log_probs: Tensor, target: Tensor) -> WeightedValue:
        """The value as a function of multiplicities; see `OverAllExamples`."""
        return weighted_detection(*_errors(log_probs, target))[self.name]

    def value(self, log_probs: Tensor, target: Tensor) -> Tensor:
        """The value of torchmetrics' class."""
        found = detection_values(*_errors(log_probs, target))[self.name]
        return torch.tensor(found, dtype=torch.float64, device=log_probs.device)


class ErrorAUROC(_ErrorDetection):
    """AUROC of wrong answers (positive) against right ones by the confidence of the top label; NaN without both."""

    higher_is_better = True
    prefix = "error_auroc"
    name = "auroc"


class ErrorAUPR(_ErrorDetection):
    """Average precision of wrong answers (positive) by falling uncertainty of the top label; NaN without both kinds."""

    higher_is_better = True
    prefix = "error_aupr"
    name = "aupr"


class ErrorFPR95(_ErrorDetection):
    """Share of right answers that are as uncertain as the most certain of 95 % of the wrong ones; NaN without both."""

    higher_is_better = False
    prefix = "error_fpr95"
    name = "fpr95"


def _errors(log_probs: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    # Log-probabilities: those of very confident examples would all be rounded to 1.
    score, predicted = log_probs.max(dim=1)
    return -score, predicted != target


_CLASSES: Mapping[str, tuple[str, Callable[[], _ErrorDetection], str]] = {
    "error_auroc": (
        "AUROC errors",
        ErrorAUROC,
        "AUROC of wrong answers (positive) against right ones by 1 - confidence",
    ),
    "error_aupr": ("AUPR errors", ErrorAUPR, "average precision of wrong answers (positive) by 1 - confidence"),
    "error_fpr95": (
        "FPR95 errors",
        ErrorFPR95,
        "share of right answers flagged where 95 % of the wrong ones (positive) are, by 1 - confidence",
    ),
}


def _spec(name: str) -> MetricSpec:
    title, metric, definition = _CLASSES[name]

    def make(binning: Binning) -> OverAllExamples:  # noqa: ARG001
        return metric()

    return over_all_examples(name, title, make, definition=definition)


SPECS = tuple(map(_spec, _CLASSES))
