"""Routers whose weights are fine-tuned without noise: the control for routers whose weights are random."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bmoe_lightning.routers.base import BayesianRouter, TrainedLogits, zeros
from bmoe_lightning.routers.distribution import DiagonalLogits
from bmoe_lightning.routers.draws import Draws
from bmoe_lightning.routers.scores import at_least_float32
from bmoe_lightning.routers.types import Router


class FineTunedWeights(BayesianRouter):
    """The router with the weight `W + shift`, and no noise. A bias stays as it is.

    The shift is zero at first, so that the logits are bitwise those of the model.

    Args:
        router: The router.
        dtype: Dtype of the shift.
    """

    def __init__(self, router: Router, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(router)
        self.shift = zeros(router.num_experts, router.d_in, dtype=dtype)

    def mean(self, u: Tensor, logits: Tensor) -> Tensor:
        return shifted(u, logits, self.shift)

    def sampler(self, u: Tensor, logits: Tensor) -> Callable[[Draws], Tensor]:
        mean = self.mean(u, logits)
        return lambda draws: mean.expand(len(draws.samples), *mean.shape)

    def trained(self, u: Tensor, logits: Tensor, draws: Draws) -> TrainedLogits:
        mean = self.mean(u, logits)
        return TrainedLogits(mean, mean.new_zeros(len(mean)))

    def distribution(self, u: Tensor, logits: Tensor) -> DiagonalLogits:
        mean = self.mean(u, logits)
        return DiagonalLogits(mean, mean.new_zeros(1))


def shifted(u: Tensor, logits: Tensor, shift: Tensor) -> Tensor:
    """The logits of a router with other weights, in float32 at least.

    Args:
        u: Input of the router, `[tokens, D]`.
        logits: Its logits, `[tokens, N]`.
        shift: What is added to its weight, `[N, D]`, or `[S, N, D]`.

    Returns:
        `[tokens, N]`, or `[S, tokens, N]`.
    """
    return at_least_float32(logits) + u.to(shift.dtype) @ shift.mT
