"""Whether a model answers better than chance."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_LEVEL = 0.05


@dataclass(frozen=True)
class Chance:
    """The accuracy of answers that do not depend on the input.

    Attributes:
        accuracy: The accuracy.
        most_common: Whether the answer is always the most common class; otherwise uniform guesses.
    """

    accuracy: float
    most_common: bool


def chance_accuracy(log_probs: Tensor) -> float:
    """Expected accuracy of uniform guesses among the present classes.

    Args:
        log_probs: Log-probabilities or logits `[N, K]`; `-inf` for absent classes.
    """
    return float(_uniform(log_probs).sum(1).div(log_probs.isfinite().sum(1).clamp(min=1)).mean())


def chance(log_probs: Tensor, target: Tensor) -> Chance:
    """The better one of uniform guesses and always the most common class.

    A class counts as more common than others only if it is so significantly (5 % over all classes), since the most
    common one of a few labels is above its probability.

    Args:
        log_probs: Log-probabilities or logits `[N, K]`; `-inf` for absent classes.
        target: Class indices `[N]`.
    """
    num_examples, num_classes = log_probs.shape
    counts = torch.bincount(target.cpu(), minlength=num_classes)
    expected = _uniform(log_probs).sum(0)
    uniform = Chance(chance_accuracy(log_probs), most_common=False)
    found = int(counts.argmax())
    share = int(counts[found]) / num_examples
    if share <= uniform.accuracy:
        return uniform
    tail = upper_tail(int(counts[found]), num_examples, float(expected[found]) / num_examples)
    return Chance(share, most_common=True) if tail * num_classes < _LEVEL else uniform


def upper_tail(successes: int, trials: int, probability: float) -> float:
    """P(X >= successes) of a binomial distribution: the p-value of the one-sided binomial test.

    Trials of different probabilities have a smaller tail than equal ones of their mean, above one more than the mean
    number of successes (Hoeffding 1956): the test is exact where all examples have equally many classes, else
    conservative.

    Args:
        successes: Number of successes.
        trials: Number of trials.
        probability: Mean probability of a success.
    """
    if successes <= 0 or probability >= 1:
        return 1.0
    if probability <= 0:
        return 0.0
    k = torch.arange(successes, trials + 1, dtype=torch.float64)
    n = torch.tensor(float(trials), dtype=torch.float64)
    log_choices = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    log_mass = log_choices + k * math.log(probability) + (n - k) * math.log1p(-probability)
    return min(1.0, float(log_mass.exp().sum()))


def chance_warning(log_probs: Tensor, target: Tensor) -> str | None:
    """A sentence if the accuracy is not significantly above `chance` (one-sided binomial test at 5 %), else None.

    Args:
        log_probs: Log-probabilities or logits `[N, K]`; `-inf` for absent classes.
        target: Class indices `[N]`.
    """
    num_examples = len(target)
    if not num_examples:
        return None
    correct = int((log_probs.argmax(dim=1) == target).sum())
    level = chance(log_probs, target)
    p_value = upper_tail(correct, num_examples, level.accuracy)
    if p_value <= _LEVEL:
        return None
    of = "that of always the most common class" if level.most_common else "chance"
    return (
        f"the accuracy of {correct / num_examples:.3f} on {num_examples} labels is not above {of} "
        f"({level.accuracy:.3f}; one-sided binomial test, p = {p_value:.2g}): the model has not learned the task, or "
        "there are too few labels to tell; train longer or with another learning rate, or add labels"
    )


def _uniform(log_probs: Tensor) -> Tensor:
    """Probabilities `[N, K]` of uniform guesses among the present classes."""
    present = log_probs.isfinite().double().cpu()
    return present / present.sum(1, keepdim=True).clamp(min=1)
