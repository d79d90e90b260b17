"""Deep-ensemble routers: predictions averaged over router weights of several training runs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from bmoe_lightning.methods.base import State
from bmoe_lightning.methods.options import option
from bmoe_lightning.methods.router_method import Average, Sampling, on_devices
from bmoe_lightning.methods.weight_router import WeightRouterMethod, stacked_shifts
from bmoe_lightning.methods.workbench import Workbench
from bmoe_lightning.routers.base import BayesianRouter, router_state, trained_dtype
from bmoe_lightning.routers.ensemble_members import EnsembleMembers
from bmoe_lightning.routers.types import Router


@dataclass(frozen=True)
class EnsembleRouter(WeightRouterMethod):
    """Averages predictions over the routes of members, whose router weights are fine-tuned in runs of their own.

    A member is the weights of all routers at the end of one run from the trained model, as in the DER of
    https://arxiv.org/abs/2509.23830. Runs differ in the order of the data, so members are more alike than networks that
    are trained from scratch. The variance of the logits is that over members. The state stores `size` numbers
    for each weight of the routers.

    Weak where the model has memorised the training data: there is no gradient, and members stay at the model.

    Raises:
        ValueError: If there is no epoch or no member.
    """

    name: str = "ensemble_router"
    label: str = "Deep-ensemble router"
    size: int = option(5, "Number of members, each from a run of its own.", trial=2)
    average: Average = option(
        "predictions",
        "What is averaged over members: `predictions` of passes along their routes, or router `scores`.",
    )
    samples_per_pass: int = option(
        1, "Number of members that one forward pass computes, on copies of the batch's rows.", prediction_only=True
    )

    cost = "`size` forward passes; one forward pass for `scores`"

    def __post_init__(self) -> None:
        if self.size < 1 or self.epochs < 1:
            raise ValueError(
                f"{self.name} trains its members, at least one, and needs epochs >= 1, got size={self.size} and "
                f"epochs={self.epochs}"
            )
        super().__post_init__()

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.average, self.size, antithetic=False, samples_per_pass=self.samples_per_pass)

    @property
    def held_out_sampling(self) -> Sampling:
        return self.sampling  # all members, which are few

    def fit(self, work: Workbench) -> State:
        found = [
            self.fine_tuned(work, replace(self.training_options, run=run), chooses_epoch=False)
            for run in range(self.size)
        ]
        states = [result.state for result in found]
        nets = [self._fitted(work, router, states) for router in self.chosen(work.routers())]
        if self.size > 1 and all(bool((net.shifts == net.shifts[0]).all()) for net in nets):
            work.warn(
                f"the members of {self.name} are equal: training data come in one order only, so that all runs are the "
                "same; pass a list of several batches, or a loader that shuffles"
            )
        losses = self.held_out_losses(work, on_devices(work.model, nets), key=self.held_out_key)
        return self.state_of(work, router_state(nets), replace(found[-1], losses=losses))

    def num_parameters(self, d_in: int, num_experts: int) -> int:
        return self.size * d_in * num_experts

    @property
    def chooses_epoch(self) -> bool:
        return False

    def stored_net(self, router: Router, state: State) -> BayesianRouter:
        return EnsembleMembers(router, self.size)

    def hyperparameters(self, state: State) -> dict[str, float]:
        numbers = super().hyperparameters(state)
        return {"members": numbers.pop("num_samples"), **numbers}

    def _fitted(self, work: Workbench, router: Router, states: list[dict[str, Tensor]]) -> EnsembleMembers:
        net = EnsembleMembers(router, self.size, dtype=trained_dtype(work.model, router))
        net.fit(stacked_shifts(states, net))
        return net
