"""Untrained Gaussian noise on a router's logits: the control for routers that train a distribution."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bmoe_lightning.routers.base import BayesianRouter, TrainedLogits
from bmoe_lightning.routers.distribution import DiagonalLogits
from bmoe_lightning.routers.draws import Draws
from bmoe_lightning.routers.scores import at_least_float32
from bmoe_lightning.routers.types import Router


class FixedNoise(BayesianRouter):
    """Independent Gaussian noise of one size on all logits of all tokens. Nothing is trained.

    Args:
        router: The router.
        scale: Standard deviation of the noise; with 0 the router stays as it is.
    """

    def __init__(self, router: Router, scale: float) -> None:
        super().__init__(router)
        self.scale = scale

    @property
    def is_still(self) -> bool:
        return self.scale == 0

    def mean(self, u: Tensor, logits: Tensor) -> Tensor:
        return at_least_float32(logits)

    def sampler(self, u: Tensor, logits: Tensor) -> Callable[[Draws], Tensor]:
        found = self.distribution(u, logits)
        return lambda draws: found.sample(draws.of_tokens(found.noise_width))

    def trained(self, u: Tensor, logits: Tensor, draws: Draws) -> TrainedLogits:
        return TrainedLogits(self.samples(u, logits, draws)[0], logits.new_zeros(len(logits)))

    def distribution(self, u: Tensor, logits: Tensor) -> DiagonalLogits:
        mean = self.mean(u, logits)
        return DiagonalLogits(mean, torch.full_like(mean[:1], self.scale))
