"""Whether a model answers better than chance."""

from __future__ import annotations

import math

from torch import Tensor

_ONE_SIDED = 1.645  # standard deviations: 95 % of a normal distribution are below


def chance_accuracy(log_probs: Tensor) -> float:
    """Expected accuracy of uniform guesses among the present classes.

    Args:
        log_probs: Log-probabilities or logits `[N, K]`; `-inf` for absent classes.
    """
    present = log_probs.isfinite().sum(dim=1).clamp(min=1)
    return float((1 / present.double()).mean())


def chance_warning(log_probs: Tensor, target: Tensor) -> str | None:
    """A sentence if the accuracy is not significantly above that of uniform guesses (one-sided, 5 %), else None.

    Args:
        log_probs: Log-probabilities or logits `[N, K]`; `-inf` for absent classes.
        target: Class indices `[N]`.
    """
    chance = chance_accuracy(log_probs)
    accuracy = float((log_probs.argmax(dim=1) == target).double().mean())
    limit = chance + _ONE_SIDED * math.sqrt(chance * (1 - chance) / len(target))
    if accuracy > limit:
        return None
    return (
        f"the accuracy of {accuracy:.3f} on {len(target)} items is not above chance ({chance:.3f}): the model has not "
        "learned the task, and calibrated probabilities would be nearly uniform; train longer, or with another "
        "learning rate"
    )
