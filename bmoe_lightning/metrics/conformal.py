"""Split conformal prediction: sets of classes that contain the label at a chosen rate.

Vovk, Gammerman and Shafer 2005 (https://doi.org/10.1007/b106715); introduced in Angelopoulos and Bates 2021
(https://arxiv.org/abs/2107.07511). A score says how badly a class fits an example. The threshold is a quantile of the
scores of N labels that the method was not fitted on, and the set of a new example has all classes up to it. If all
examples are exchangeable it contains the label with a probability of at least the chosen coverage, whatever the
method; without ties, and if sets may be empty, by at most 1 / (N + 1) more. The probability is over examples *and*
labels that the threshold was taken from: it is marginal, and says nothing about one example, one class or one subject.

Both scores are taken to a scale on which no order is lost to rounding, by an increasing function, which changes no set:

- `lac`: 1 - p_y, the least ambiguous sets (Sadinle, Lei and Wasserman 2019, https://arxiv.org/abs/1609.00451), as
  -log p_y.
- `aps`: the mass M of all classes at least as probable as y (adaptive prediction sets; Romano, Sesia and Candes 2020,
  https://arxiv.org/abs/2006.02544, without their randomisation), as -log(1 - M). It is infinite for the least probable
  class, whose sets have all classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from bmoe_lightning.metrics.base import OverAllExamples, WeightedValue
from bmoe_lightning.metrics.binning import Binning
from bmoe_lightning.metrics.inputs import check_log_probs, check_predictions
from bmoe_lightning.metrics.spec import MetricSpec, over_all_examples

ConformalScore = Literal["lac", "aps"]
"""How badly a class fits an example, by its probability (`lac`) or the mass of all at least as probable (`aps`)."""

# Keeps a product such as 0.07 * 100 = 7.000000000000001 from taking the next larger score.
_ROUNDING = 1e-9
# Comparisons of a chunk of resamples x examples x classes.
_CHUNK = 4_000_000


def conformal_threshold(
    log_probs: Tensor, target: Tensor, *, coverage: float = 0.9, score: ConformalScore = "lac"
) -> Tensor:
    """Threshold of the scores: that of the labels which is the `ceil((N + 1) coverage)`-th smallest.

    Args:
        log_probs: Normalised natural log-probabilities `[N, K]` of examples that the method was not fitted on.
        target: Class indices, `[N]`.
        coverage: Probability in (0, 1) with which a set should contain the label.
        score: Score of a class.

    Returns:
        A float64 scalar: -log p for `lac`, -log(1 - mass) for `aps`. Infinite, so that sets have all present classes,
        if N is too small for the coverage, below `coverage / (1 - coverage)`.

    Raises:
        TypeError: If a tensor has the wrong dtype; see `check_predictions`.
        ValueError: If the predictions are refused, see `check_predictions`, or a setting is not supported.
    """
    _check_settings(coverage, score)
    log_probs, target = check_predictions(log_probs.detach(), target)
    labels = _of_labels(_scores(log_probs, score), target)
    return _thresholds(labels, torch.ones_like(labels)[None], coverage)[0]


def check_num_labels(num_labels: int, coverage: float) -> None:
    """Check that labels are enough for a finite threshold: with fewer, every set has all present classes.

    Args:
        num_labels: Number of labels that a threshold is to be taken from.
        coverage: Probability in (0, 1) with which a set should contain the label.

    Raises:
        ValueError: If there are too few, or the coverage is not supported.
    """
    _check_coverage(coverage)
    needed = math.ceil(coverage / (1 - coverage) - _ROUNDING)
    if num_labels < needed:
        raise ValueError(
            f"{num_labels} labels are too few for a coverage of {coverage}: every set would have all classes; give at "
            f"least {needed}, or a lower coverage"
        )


def prediction_sets(log_probs: Tensor, threshold: Tensor | float, *, score: ConformalScore) -> Tensor:
    """Sets of the classes whose score is at most the threshold.

    The most probable class is always in, so no set is empty; of several that are equally probable all are. This raises
    the coverage above the chosen one where the score alone would leave out a most probable class that is the label:
    always where the accuracy exceeds the chosen coverage, and with `aps` also below it, since the score of a class is
    the larger the more confident it is the top one. Absent classes are never in.

    Args:
        log_probs: Normalised natural log-probabilities, `[N, K]`.
        threshold: From `conformal_threshold`, a scalar.
        score: Score that the threshold is of.

    Returns:
        Whether each class is in the set, `[N, K]` bool.

    Raises:
        TypeError: If `log_probs` is not floating.
        ValueError: If the log-probabilities are refused, see `check_log_probs`, the threshold is NaN or no scalar, or
            the score is not supported.
    """
    _check_score(score)
    number = torch.as_tensor(threshold, dtype=torch.float64)
    if number.ndim or bool(number.isnan()):
        raise ValueError(f"threshold must be a scalar that is not NaN, found {threshold}")
    log_probs = check_log_probs(log_probs.detach())
    return _least_thresholds(log_probs, score) <= number.to(log_probs.device)


@dataclass(frozen=True)
class PredictionSets:
    """A fitted threshold, for new examples: called with log-probabilities `[N, K]` it returns their sets.

    Attributes:
        score: Score of a class.
        coverage: Probability with which a set should contain the label.
        threshold: Largest score in a set, from `conformal_threshold`.
        num_labels: Number of labels that the threshold was taken from.

    Raises:
        ValueError: If a value is not supported.
    """

    score: ConformalScore
    coverage: float
    threshold: float
    num_labels: int

    def __post_init__(self) -> None:
        _check_settings(self.coverage, self.score)
        if math.isnan(self.threshold):
            raise ValueError("threshold must not be NaN; take it from conformal_threshold")
        if self.num_labels < 1:
            raise ValueError(f"num_labels must be at least 1, found {self.num_labels}")

    @classmethod
    def fit(
        cls, log_probs: Tensor, target: Tensor, *, coverage: float = 0.9, score: ConformalScore = "lac"
    ) -> PredictionSets:
        """Take the threshold from labelled examples; arguments and errors are those of `conformal_threshold`."""
        threshold = conformal_threshold(log_probs, target, coverage=coverage, score=score)
        return cls(score, coverage, float(threshold), len(target))

    def __call__(self, log_probs: Tensor) -> Tensor:
        """Sets of new examples, `[N, K]` bool; see `prediction_sets`.

        Args:
            log_probs: Normalised natural log-probabilities, `[N, K]`.

        Raises:
            TypeError: If `log_probs` is not floating.
            ValueError: If the log-probabilities are refused; see `check_log_probs`.
        """
        return prediction_sets(log_probs, self.threshold, score=self.score)


class SizeAndCoverage(NamedTuple):
    """What prediction sets are like.

    Attributes:
        size: Mean number of classes in a set, a float64 scalar of at least 1.
        coverage: Share of sets that contain the label, a float64 scalar in [0, 1].
    """

    size: Tensor
    coverage: Tensor


def cross_fitted_sets(
    log_probs: Tensor, target: Tensor, *, coverage: float = 0.9, score: ConformalScore = "lac"
) -> SizeAndCoverage:
    """Size and coverage of the prediction sets of one labelled data set, by cross-fitting with two folds.

    The folds are the examples at even and at odd positions. Sets of one have the threshold of the other, so that no
    label helps to choose its set. The folds of several methods on one data set are the same, and the order of the
    examples matters; where it has a meaning, shuffle them first.

    Args:
        log_probs: Normalised natural log-probabilities, `[N, K]`.
        target: Class indices, `[N]`.
        coverage: Probability in (0, 1) with which a set should contain the label.
        score: Score of a class.

    Raises:
        TypeError: As `conformal_threshold`.
        ValueError: As `conformal_threshold`.
    """
    _check_settings(coverage, score)
    log_probs, target = check_predictions(log_probs.detach(), target)
    ones = torch.ones(1, len(target), dtype=torch.float64, device=log_probs.device)
    size, covered = _cross_fitted(log_probs, target, coverage, score)(ones)
    return SizeAndCoverage(size[0], covered[0])


class _OfSets(OverAllExamples):
    """Base class of both; a subclass defines `prefix`, and which part of `SizeAndCoverage` it is."""

    part: Literal["size", "coverage"]

    def __init__(self, score: ConformalScore = "lac", coverage: float = 0.9, **kwargs: Any) -> None:
        _check_settings(coverage, score)
        super().__init__(**kwargs)
        self.score: ConformalScore = score
        self.coverage = coverage

    def weighted(self, log_probs: Tensor, target: Tensor) -> WeightedValue:
        """The value as a function of multiplicities; all copies of an example are in one fold."""
        of_weights = _cross_fitted(log_probs, target, self.coverage, self.score)
        return lambda weights: getattr(of_weights(weights), self.part)


class SetSize(_OfSets):
    """Mean number of classes in a prediction set; a torchmetrics class of `cross_fitted_sets`.

    Args:
        score: Score of a class.
        coverage: Probability in (0, 1) with which a set should contain the label.
        kwargs: Passed on to `torchmetrics.Metric`.

    Raises:
        ValueError: If a setting is not supported.
    """

    higher_is_better = False
    plot_lower_bound = 1.0
    plot_upper_bound = None
    prefix = "set_size"
    part = "size"


class SetCoverage(_OfSets):
    """Share of prediction sets that contain the label; a torchmetrics class of `cross_fitted_sets`.

    Arguments and errors are those of `SetSize`.
    """

    # It should be near the chosen one: less is a broken promise, and more is paid for with larger sets.
    higher_is_better = None
    prefix = "set_coverage"
    part = "coverage"


def _check_settings(coverage: float, score: ConformalScore) -> None:
    _check_score(score)
    _check_coverage(coverage)


def _check_coverage(coverage: float) -> None:
    if not 0.0 < coverage < 1.0:
        raise ValueError(f"coverage must lie between 0 and 1, exclusive, found {coverage}")


def _check_score(score: ConformalScore) -> None:
    if score not in get_args(ConformalScore):
        raise ValueError(f"score must be one of {get_args(ConformalScore)}, found {score!r}")


def _scores(log_probs: Tensor, score: ConformalScore) -> Tensor:
    """Scores of all classes `[N, K]`; infinite for absent ones."""
    if score == "lac":
        return -log_probs
    # The mass of the less probable classes, and not that of the others subtracted from 1: confident examples have
    # masses that would all be rounded to 1.
    ascending = log_probs.sort(dim=1).values
    mass = torch.nn.functional.pad(ascending.logcumsumexp(1), (1, 0), value=-torch.inf)
    less_probable = torch.searchsorted(ascending, log_probs.contiguous())
    return -mass.gather(1, less_probable)


def _of_labels(values: Tensor, target: Tensor) -> Tensor:
    """Values of the labels `[N]`, from those of all classes `[N, K]`."""
    return values.gather(1, target[:, None]).squeeze(1)


def _least_thresholds(log_probs: Tensor, score: ConformalScore) -> Tensor:
    """Smallest threshold with which a class is in the set, `[N, K]`; NaN, which is at most nothing, if it never is."""
    top = log_probs == log_probs.amax(1, keepdim=True)
    least = _scores(log_probs, score).masked_fill(top, -torch.inf)
    return least.masked_fill(log_probs == -torch.inf, torch.nan)


def _thresholds(scores: Tensor, weights: Tensor, coverage: float) -> Tensor:
    """Thresholds `[R]` from the scores `[N]` of labels with multiplicities `[R, N]`."""
    ordered, order = scores.sort()
    counted = weights[:, order].cumsum(1)
    rank = torch.ceil((weights.sum(1) + 1) * coverage - _ROUNDING).clamp(min=1)
    place = torch.searchsorted(counted, rank[:, None]).squeeze(1)
    # One past the last is where there are too few labels.
    return torch.nn.functional.pad(ordered, (0, 1), value=torch.inf)[place]


def _cross_fitted(
    log_probs: Tensor, target: Tensor, coverage: float, score: ConformalScore
) -> Callable[[Tensor], SizeAndCoverage]:
    """From multiplicities `[R, N]` to mean sizes and coverages `[R]`; see `cross_fitted_sets`."""
    labels = _of_labels(_scores(log_probs, score), target)
    least = _least_thresholds(log_probs, score)
    least_of_label = _of_labels(least, target)
    even = torch.arange(len(target), device=log_probs.device) % 2 == 0

    def of_fold(weights: Tensor, fold: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over the examples of a fold, with thresholds of the others."""
        threshold = _thresholds(labels[~fold], weights[:, ~fold], coverage)[:, None]
        size = (least[fold] <= threshold[..., None]).sum(2)
        return (weights[:, fold] * size).sum(1), (weights[:, fold] * (least_of_label[fold] <= threshold)).sum(1)

    def of_chunk(weights: Tensor) -> Tensor:
        sums = [torch.stack(of_fold(weights, fold)) for fold in (even, ~even)]
        return (sums[0] + sums[1]) / weights.sum(1)

    def value(weights: Tensor) -> SizeAndCoverage:
        chunks = weights.split(max(1, _CHUNK // log_probs.numel()))
        size, covered = torch.cat([of_chunk(chunk) for chunk in chunks], dim=1)
        return SizeAndCoverage(size, covered)

    return value


def _specs(score: ConformalScore) -> tuple[MetricSpec, MetricSpec]:
    title = score.upper()

    def size(binning: Binning) -> OverAllExamples:  # noqa: ARG001
        return SetSize(score)

    def covered(binning: Binning) -> OverAllExamples:  # noqa: ARG001
        return SetCoverage(score)

    return (
        over_all_examples(
            f"set_size_{score}",
            f"Set size {title}",
            size,
            definition=f"mean number of classes in conformal prediction sets for a coverage of 90 %, {title} score; "
            "thresholds of examples at even positions for those at odd ones, and the reverse",
            lower=1.0,
            upper=torch.inf,
        ),
        over_all_examples(
            f"set_coverage_{score}",
            f"Set coverage {title}",
            covered,
            definition=f"share of these sets that contain the label, {title} score; should be .9 or a little more",
        ),
    )


SPECS = (*_specs("lac"), *_specs("aps"))
