"""torchao's AdamW with stochastic rounding to bfloat16, reproducible and equal on all ranks. Imports torchao."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim import Optimizer
from torchao.optim import _AdamW

from bmoe_lightning.utils.random_state import forked_random_state

_DRAWS = "rounding_draws"


class StochasticAdamW(_AdamW):
    """torchao's AdamW, whose rounding draws from a seed and the number of the step.

    torchao draws from torch's global state: replicas of DDP would drift apart where it differs between ranks, and a
    resumed run would draw other numbers. torchao compiles the update, once for every shape of a weight.
    """

    keeps_small_updates = True

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all weights that have a gradient.

        Args:
            closure: Function that computes gradients and returns the loss.
        """
        loss = None
        if closure is not None:  # outside of the forked random state: dropout draws from the global one
            with torch.enable_grad():
                loss = closure()
        with forked_random_state():
            torch.manual_seed(hash((self.defaults["seed"], self.param_groups[0][_DRAWS])) % 2**63)
            super().step()
        self.param_groups[0][_DRAWS] += 1
        return loss


def make_stochastic_adamw(
    parameters: Sequence[Any], *, lr: float, betas: tuple[float, float], weight_decay: float, seed: int
) -> Optimizer:
    """AdamW with stochastic rounding over bfloat16 parameters; see `make_adamw` for the arguments."""
    optimizer = StochasticAdamW(parameters, lr=lr, betas=betas, weight_decay=weight_decay, bf16_stochastic_round=True)
    optimizer.defaults["seed"] = seed
    for group in optimizer.param_groups:
        group[_DRAWS] = 0
    return optimizer
