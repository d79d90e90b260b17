"""MC-dropout routers: predictions averaged over dropout masks on the inputs of the routers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bmoe_lightning.methods.base import State
from bmoe_lightning.methods.batch_view import BatchView
from bmoe_lightning.methods.needs import Needs
from bmoe_lightning.methods.options import option
from bmoe_lightning.methods.router_method import SampledRouterMethod, on_devices
from bmoe_lightning.methods.weight_router import WeightRouterMethod, untrained
from bmoe_lightning.methods.workbench import Workbench
from bmoe_lightning.routers.base import BayesianRouter, router_state, trained_dtype
from bmoe_lightning.routers.costs import RouterCost, dropout_cost
from bmoe_lightning.routers.dropout_inputs import DropoutInputs
from bmoe_lightning.routers.interception import intercepted_routers
from bmoe_lightning.routers.types import Router
from bmoe_lightning.routers.weights import check_linear, router_weight


@dataclass(frozen=True)
class MCDropoutRouter(WeightRouterMethod, SampledRouterMethod):
    """Averages predictions over routes, sampled by dropout on the input of every router.

    A token has one mask for each router in a pass. The rate is fitted on held-out labels unless it is given. By default
    nothing is trained; with `epochs`, the routers' weights are fine-tuned with that dropout, as in the MCDR of
    https://arxiv.org/abs/2509.23830, and the held-out labels choose the epoch. Predictions are averaged, or scores; the
    code of the paper averages logits, which are those without dropout as the number of masks grows.

    The variance of the logits is in closed form, `p / (1 - p) W diag(u^2) W^T` without the common shift, and not
    sampled. It grows with the size of the router's input, whether the model knows the input or not.

    Raises:
        ValueError: If a rate is not in (0, 1).
    """

    name: str = "mc_dropout_router"
    label: str = "MC-dropout router"
    rate: float | None = option(None, "Probability that an input of a router is dropped; None fits it among `rates`.")
    rates: tuple[float, ...] = option(
        (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7),
        "Candidates for the rate; 0, the model itself, is another one.",
        trial=(0.3,),
    )
    epochs: int = option(0, "Number of passes over the training data; 0 leaves the routers' weights as they are.")

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "rates", tuple(self.rates))
        given = self.rates if self.rate is None else (self.rate,)
        if not given or not all(0 < rate < 1 for rate in given):
            raise ValueError(f"the rate of {self.name}, or all its candidates, must be in (0, 1), got {given}")

    @property
    def needs(self) -> Needs:
        return replace(super().needs, training_labels=self.epochs > 0)

    def check_routers(self, model: nn.Module, routers: Sequence[Router], run: Callable[[], Tensor]) -> None:
        super().check_routers(model, routers, run)
        _check_linear(model, self.chosen(routers), run)

    def fit(self, work: Workbench) -> State:
        work.on_first_batch(
            lambda view: _check_linear(view.model, self.chosen(work.routers()), lambda: view.forward()[0])
        )
        rates = sorted(self.rates) if self.rate is None else [self.rate]
        candidates = [self._nets(work, rate) for rate in rates]
        predicted = [self.predicted_in_training(nets) for nets in candidates]

        def tried(view: BatchView) -> Tensor:
            return torch.stack([view.logits.log_softmax(-1), *(predict(view) for predict in predicted)])

        log_probs, labels = work.held_out_log_probs(tried, key=self.held_out_key)
        losses = [float(F.nll_loss(one, labels)) for one in log_probs]
        best = min(range(1, len(losses)), key=lambda index: losses[index])
        chosen = best if self.rate is not None or losses[best] < losses[0] else 0
        if not chosen:
            work.warn(
                f"the dropout of {self.name} is fitted as 0: none of the rates lowers the NLL of the held-out labels, "
                "so the predictions are those of the model itself"
            )
        elif self.rate is None and chosen == len(rates):
            work.warn(f"the rate of {self.name} is the largest candidate ({rates[-1]:g}); add larger ones to rates")
        nets = candidates[chosen - 1] if chosen else self._nets(work, 0.0)
        found = untrained([losses[0], losses[chosen]])
        if self.epochs and chosen:
            key = DropoutInputs, self.layers, self.training_options, rates[chosen - 1]
            predict = self.predicted_in_training(nets)
            found = work.router_passes.train(key, nets, self.training_options, predict, predict_key=self.held_out_key)
            if not found.epoch:
                work.warn(
                    f"no epoch of training gave the routers of {self.name} a lower NLL on the held-out labels "
                    f"({min(found.losses[1:]):.4f}) than dropout alone ({found.losses[0]:.4f}), so they are untrained"
                )
        return self.state_of(work, router_state(nets), found)

    def token_cost(self, d_in: int, num_experts: int, num_samples: int) -> RouterCost:
        return dropout_cost(d_in, num_experts, num_samples)

    def num_parameters(self, d_in: int, num_experts: int) -> int:
        return (1 + (self.epochs > 0)) * d_in * num_experts + 1  # the weight, its shift, and the rate

    @property
    def chooses_epoch(self) -> bool:
        return self.epochs > 0

    @property
    def loss_counts(self) -> Collection[int]:
        return {2, *super().loss_counts}  # without and with dropout, or of its training

    def stored_net(self, router: Router, state: State) -> BayesianRouter:
        return DropoutInputs(router, torch.zeros(router.num_experts, router.d_in), 0.0, trains_weight=self.epochs > 0)

    def hyperparameters(self, state: State) -> dict[str, float]:
        rates = [float(value) for name, value in state.items() if name.endswith(".rate")]
        return {**super().hyperparameters(state), **({"rate": rates[0]} if rates else {})}

    def _nets(self, work: Workbench, rate: float) -> list[BayesianRouter]:
        def made(router: Router) -> BayesianRouter:
            weight, dtype = router_weight(work.model, router), trained_dtype(work.model, router)
            return DropoutInputs(router, weight, rate, trains_weight=self.epochs > 0, dtype=dtype)

        return on_devices(work.model, [made(router) for router in self.chosen(work.routers())])


def _check_linear(model: nn.Module, routers: Sequence[Router], run: Callable[[], Tensor]) -> int:
    """Check that the routers' logits are their weights times their inputs; the number of routers."""

    def check(router: Router, u: Tensor, logits: Tensor) -> Tensor:
        if router in weights:
            check_linear(router, weights.pop(router), u, logits)
        return logits

    weights = {router: router_weight(model, router) for router in routers}
    with intercepted_routers(model, list(routers), check):
        run()
    return len(routers)
