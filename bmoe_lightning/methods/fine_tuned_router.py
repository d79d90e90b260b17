"""Fine-tuned routers: the control for methods that make routers Bayesian and train them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bmoe_lightning.methods.base import State
from bmoe_lightning.methods.batch_view import BatchView
from bmoe_lightning.methods.router_method import Sampling
from bmoe_lightning.methods.weight_router import WeightRouterMethod
from bmoe_lightning.methods.workbench import Workbench
from bmoe_lightning.routers.base import BayesianRouter
from bmoe_lightning.routers.fine_tuned_weights import FineTunedWeights
from bmoe_lightning.routers.types import Router


@dataclass(frozen=True)
class FineTunedRouter(WeightRouterMethod):
    """Predicts with routers whose weights are fine-tuned by maximum likelihood: no noise, and nothing Bayesian.

    It is the control for routers that train a distribution, with the training data, the number of epochs and the layers
    of these: what they gain beyond it is not due to fine-tuning alone. The held-out labels choose the epoch.

    Weak where the model has memorised the training data, which leave no gradient to the routers.
    """

    name: str = "fine_tuned_router"
    label: str = "Fine-tuned router (MLE)"

    cost = "one forward pass"

    @property
    def sampling(self) -> Sampling:
        return Sampling()

    @property
    def held_out_sampling(self) -> Sampling:
        return self.sampling  # none

    def fit(self, work: Workbench) -> State:
        found = self.fine_tuned(work, self.training_options, chooses_epoch=True)
        if self.epochs and not found.epoch:
            work.warn(
                f"no epoch of training gave the routers of {self.name} a lower NLL on the held-out labels "
                f"({min(found.losses[1:]):.4f}) than those of the model ({found.losses[0]:.4f}), so they are the "
                "model's own"
            )
        return self.state_of(work, found.state, found)

    def num_parameters(self, d_in: int, num_experts: int) -> int:
        return d_in * num_experts

    def stored_net(self, router: Router, state: State) -> BayesianRouter:
        return FineTunedWeights(router)

    def uncertainty(self, batch: BatchView, state: State) -> dict[str, Tensor]:
        """Entropy of the gate; the routers have no variance, and there is one route."""
        scores = super().uncertainty(batch, state)
        return {name: score for name, score in scores.items() if name == "router_gate_entropy"}

    def hyperparameters(self, state: State) -> dict[str, float]:
        numbers = super().hyperparameters(state)
        return {name: value for name, value in numbers.items() if name != "num_samples"}
