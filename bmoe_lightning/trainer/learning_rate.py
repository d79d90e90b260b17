"""Learning-rate schedules with a linear warm-up."""

from __future__ import annotations

import math
from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

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


def make_scheduler(optimizer: Optimizer, schedule: Schedule, total: float, warmup_fraction: float) -> LambdaLR:
    """A scheduler that steps after every optimizer step.

    Args:
        optimizer: Optimizer with the peak learning rate.
        schedule: Schedule, as for `learning_rate_factor`.
        total: Number of steps; infinite if unknown.
        warmup_fraction: Fraction of the steps with linear warm-up, in [0, 1).

    Raises:
        ValueError: If the number of steps is unknown and needed.
    """
    if math.isinf(total) and (schedule != "constant" or warmup_fraction):
        raise ValueError(
            f"the schedule {schedule!r} with warmup_fraction={warmup_fraction} needs the number of training steps, "
            "which is unknown; set max_steps or max_epochs of the trainer, or use schedule='constant' without warm-up"
        )
    warmup = 0 if math.isinf(total) else round(warmup_fraction * total)
    return LambdaLR(optimizer, lambda step: learning_rate_factor(step, total, warmup, schedule))
