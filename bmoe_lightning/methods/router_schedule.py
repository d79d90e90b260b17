"""Options of a training of routers, its optimizer and learning rate, and the steps after which states are collected."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from bmoe_lightning.routers.base import BayesianRouter

_RATE_TIMES_WIDTH = 0.64

Optimizer = Literal["adamw", "sgd"]


@dataclass(frozen=True)
class RouterTrainingOptions:
    """Options of a training of routers.

    Attributes:
        epochs: Number of passes over the training data, all in the same order.
        learning_rate: Largest learning rate; None is `0.64 / D` for a router input of width D, so that a step of AdamW
            moves the logits about as far whatever the width is.
        beta: What multiplies the penalty, which is a mean over tokens.
        optimizer: AdamW with warm-up and half a cosine, or SGD with a constant learning rate.
        collections: Number of states that are collected along the run, equally many steps apart and the last one at the
            end; fewer where there are fewer steps.
        run: Number of the run, which its random numbers and the order of its data depend on.
        warmup: Share of the steps in which the learning rate grows, before it falls along a cosine.
        weight_decay: Decoupled weight decay.
        score_function: Whether random choices get the gradient of their log-probability times the loss.
    """

    epochs: int
    learning_rate: float | None
    beta: float = 0.0
    optimizer: Optimizer = "adamw"
    collections: int = 0
    run: int = 0
    warmup: float = 0.05
    weight_decay: float = 0.0
    score_function: bool = False


def router_optimizer(nets: Sequence[BayesianRouter], options: RouterTrainingOptions) -> torch.optim.Optimizer:
    """The optimizer of routers, each with the largest learning rate of its width.

    Args:
        nets: The routers.
        options: Options of the training.
    """
    groups = [{"params": list(net.parameters()), "lr": _largest_rate(options, net)} for net in nets]
    kind = torch.optim.SGD if options.optimizer == "sgd" else torch.optim.AdamW
    return kind(groups, weight_decay=options.weight_decay)


def _largest_rate(options: RouterTrainingOptions, net: BayesianRouter) -> float:
    return _RATE_TIMES_WIDTH / net.router.d_in if options.learning_rate is None else options.learning_rate


def rate_share(step: int, num_steps: int, options: RouterTrainingOptions) -> float:
    """The share of the largest learning rate in a step: a linear warm-up, then half a cosine; 1 for SGD.

    Args:
        step: Number of the step, from 0.
        num_steps: Number of steps.
        options: Options of the training.
    """
    if options.optimizer == "sgd":
        return 1.0
    warm = max(1, math.ceil(options.warmup * num_steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, num_steps - warm)))


def collecting_steps(collections: int, num_steps: int) -> frozenset[int]:
    """The numbers of the steps, from 1, after which states are collected.

    Args:
        collections: Their number, at most one after each step.
        num_steps: Number of steps.
    """
    return frozenset(round((number + 1) * num_steps / collections) for number in range(collections)) - {0}
