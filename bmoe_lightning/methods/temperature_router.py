"""Variational temperature routers: experts are drawn, with a temperature of each token that is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from bmoe_lightning.methods.options import option
from bmoe_lightning.methods.router_schedule import RouterTrainingOptions
from bmoe_lightning.methods.variational_router import VariationalRouterMethod
from bmoe_lightning.methods.workbench import Workbench
from bmoe_lightning.routers.base import BayesianRouter, hidden_width
from bmoe_lightning.routers.choices import choice_ways
from bmoe_lightning.routers.costs import RouterCost, temperature_cost
from bmoe_lightning.routers.temperature import TemperatureChoice, check_drawn
from bmoe_lightning.routers.types import Router


@dataclass(frozen=True)
class TemperatureRouter(VariationalRouterMethod):
    """Averages predictions over routes, whose experts are drawn from `softmax(logits / T)` with a trained T per token.

    The VTSR of https://arxiv.org/abs/2509.23830 and https://arxiv.org/abs/2603.09453. K distinct experts are drawn by
    Gumbel noise, and T is held near 1 by the divergence of the tempered probabilities from the router's own; the
    papers' penalty `-log T` has no bound, and their top K of one-hot draws sends a batch to the same experts. Their
    prediction is one pass with one draw: `average="scores", num_samples=1`.

    No gradient passes through the draw: T learns through the weights of the drawn experts alone, unless
    `score_function` adds the rest, which is unbiased for the cross entropy alone and has much variance. T starts at
    1 whatever the size of the logits, which is random routing where they are small. One pass with drawn experts is
    less accurate than the model.
    """

    name: str = "temperature_router"
    label: str = "Temperature router"
    temper_weights: bool = option(
        True,
        "Whether the weights of the drawn experts are tempered too, as in the papers; otherwise T -> 0 is the model.",
    )
    score_function: bool = option(
        False, "Whether T gets the gradient of the draws' log-probability times the loss as well."
    )

    _fewest_samples = 1

    reported = ("gate_temperature",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs and not self.temper_weights and not self.score_function:
            raise ValueError(
                "with temper_weights=False no gradient of the loss reaches the temperature, which would stay as it is; "
                "set score_function=True, or epochs=0"
            )

    @property
    def training_options(self) -> RouterTrainingOptions:
        return replace(super().training_options, score_function=self.score_function)

    def check_routers(self, model: nn.Module, routers: Sequence[Router], run: Callable[[], Tensor]) -> None:
        super().check_routers(model, routers, run)
        chosen = self.chosen(routers)
        for router in chosen:
            check_drawn(router)
        choice_ways(model, chosen, run)

    def way(self, work: Workbench) -> bool:
        chosen = self.chosen(work.routers())
        return bool(work.on_first_batch(lambda view: choice_ways(view.model, chosen, lambda: view.forward()[0])))

    def token_cost(self, d_in: int, num_experts: int, num_samples: int) -> RouterCost:
        return temperature_cost(d_in, num_experts, self.hidden)

    def num_parameters(self, d_in: int, num_experts: int) -> int:
        return self.token_cost(d_in, num_experts, 0).linear + hidden_width(d_in, self.hidden) + 1  # and the biases

    def make_net(self, router: Router, unit: float, way: bool, dtype: torch.dtype, seed: int) -> BayesianRouter:
        return TemperatureChoice(
            router,
            returns_choice=way,
            temper_weights=self.temper_weights,
            hidden=self.hidden,
            seed=seed,
            dtype=dtype,
        )
