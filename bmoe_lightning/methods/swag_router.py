"""SWAG routers: predictions averaged over router weights from a Gaussian that is fitted along a run of SGD."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bmoe_lightning.methods.base import State
from bmoe_lightning.methods.options import option
from bmoe_lightning.methods.router_method import SampledRouterMethod, on_devices
from bmoe_lightning.methods.router_schedule import RouterTrainingOptions
from bmoe_lightning.methods.weight_router import WeightRouterMethod, stacked_shifts
from bmoe_lightning.methods.workbench import Workbench
from bmoe_lightning.routers.base import BayesianRouter, router_state, trained_dtype
from bmoe_lightning.routers.swag_samples import SwagSamples
from bmoe_lightning.routers.types import Router

_COUNT = "num_deviations"


@dataclass(frozen=True)
class SWAGRouter(WeightRouterMethod, SampledRouterMethod):
    """Averages predictions over routes of router weights, sampled from SWAG's Gaussian; one sample for all tokens.

    From the trained model, the routers' weights are trained by SGD with a constant rate and collected along the run:
    mean, variances and the last deviations from the running mean (Maddox et al. 2019, A Simple Baseline for Bayesian
    Uncertainty in Deep Learning), as in the SWAGR of https://arxiv.org/abs/2509.23830. The variance of the logits is in
    closed form. The state stores `rank + 2` numbers for each weight of the routers.

    Weak where the model has memorised the training data: SGD has no gradient to move by, and the Gaussian is narrow
    whatever the rate. A rate that is large enough to widen it may as well ruin the routers.

    Raises:
        ValueError: If there is no epoch, or weights are collected less than twice.
    """

    name: str = "swag_router"
    label: str = "SWAG router"
    epochs: int = option(5, "Number of passes over the training data.", trial=1)
    learning_rate: float | None = option(0.2, "Constant learning rate of SGD.")
    collections: int = option(20, "Number of times that the weights are collected, at most once in a step.")
    rank: int = option(20, "Maximum number of deviations, of the last collections.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs < 1 or self.collections < 2 or self.rank < 2:
            raise ValueError(
                f"{self.name} fits a Gaussian to weights that are collected in training, at least twice, got "
                f"epochs={self.epochs}, collections={self.collections} and rank={self.rank}; the Gaussian's scale "
                "divides by their number less one"
            )

    @property
    def training_options(self) -> RouterTrainingOptions:
        return replace(super().training_options, optimizer="sgd", collections=self.collections)

    def fit(self, work: Workbench) -> State:
        found = self.fine_tuned(work, self.training_options, chooses_epoch=False)
        count = len(found.collected)
        if count < 2:
            raise ValueError(
                f"{self.name} needs the weights of at least 2 steps, and training has {count}; pass smaller batches, "
                "or raise epochs"
            )
        if count < self.collections:
            work.warn(
                f"the weights of {self.name} are collected {count} times and not {self.collections}, since training "
                "has no more steps; pass smaller batches, or raise epochs"
            )
        nets = [self._fitted(work, router, found.collected) for router in self.chosen(work.routers())]
        losses = self.held_out_losses(work, on_devices(work.model, nets), key=self.held_out_key)
        state = self.state_of(work, router_state(nets), replace(found, losses=losses))
        return {_COUNT: torch.tensor(min(self.rank, count)), **state}

    def check_state(self, state: State) -> None:
        count = state.get(_COUNT)
        if count is None or count.dim() or count.is_floating_point() or int(count) not in range(2, self.rank + 1):
            raise ValueError(f"{_COUNT!r} must be a whole number of 2 to {self.rank}")
        super().check_state(state)

    def num_parameters(self, d_in: int, num_experts: int) -> int:
        return (min(self.rank, self.collections) + 2) * d_in * num_experts

    @property
    def chooses_epoch(self) -> bool:
        return False

    def stored_net(self, router: Router, state: State) -> BayesianRouter:
        return SwagSamples(router, int(state[_COUNT]))

    def _fitted(self, work: Workbench, router: Router, collected: tuple[Mapping[str, Tensor], ...]) -> BayesianRouter:
        net = SwagSamples(router, min(self.rank, len(collected)), dtype=trained_dtype(work.model, router))
        net.fit(stacked_shifts(collected, net))
        return net
