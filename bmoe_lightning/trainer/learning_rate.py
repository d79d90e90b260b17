"""Learning-rate schedules with a linear warm-up, and checks of the numbers of an optimizer."""

from __future__ import annotations

import math
from collections.abc import Sequence
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


def check_numbers(
    learning_rate: float,
    weight_decay: float,
    betas: Sequence[float],
    warmup_fraction: float,
    dropout: tuple[str, float],
) -> None:
    """Check the numbers of an optimizer, its schedule, and a dropout.

    Args:
        learning_rate: Peak learning rate.
        weight_decay: Weight decay.
        betas: Betas of AdamW.
        warmup_fraction: Fraction of the steps with warm-up.
        dropout: Name of the argument, and its probability.

    Raises:
        ValueError: If one is out of range; the message names it.
    """
    checks = (
        ("learning_rate", learning_rate, 0 < learning_rate < math.inf, "positive"),
        ("weight_decay", weight_decay, 0 <= weight_decay < math.inf, "0 or more"),
        ("betas", betas, len(betas) == 2 and all(0 <= beta < 1 for beta in betas), "two numbers in [0, 1)"),
        ("warmup_fraction", warmup_fraction, 0 <= warmup_fraction < 1, "in [0, 1)"),
        (*dropout, 0 <= dropout[1] < 1, "in [0, 1)"),
    )
    for name, value, holds, valid in checks:
        if not holds:
            raise ValueError(f"{name} must be {valid}, got {value}")
