"""Learning-rate schedules with a linear warm-up."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["linear", "cosine", "constant"]


def learning_rate_factor(step: int, total: float, warmup: int, schedule: Schedule) -> float:
    """The learning rate of a step as a fraction of its peak.

    Args:
        step: Index of the step, from 0.
        total: Number of steps; may be infinite for a constant schedule.
        warmup: Number of warm-up steps, in which it increases linearly from `1 / warmup`.
        schedule: Schedule: `linear` or `cosine` (zero from step `total` on), or `constant`.
    """
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    remaining = max(0.0, (total - step) / max(1, total - warmup))
    return remaining if schedule == "linear" else 0.5 * (1 - math.cos(math.pi * remaining))
