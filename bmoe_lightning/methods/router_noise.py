"""Untrained Gaussian noise on the routers' logits: the control for methods that train a distribution over routes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bmoe_lightning.methods.base import State, scalar, state_numbers
from bmoe_lightning.methods.batch_view import BatchView
from bmoe_lightning.methods.evaluation import average_log_probs
from bmoe_lightning.methods.needs import Needs
from bmoe_lightning.methods.noise_routes import (
    NoiseRoutes,
    check_noise_state,
    check_scales,
    noise_nets,
    warn_of_scale,
)
from bmoe_lightning.methods.options import option
from bmoe_lightning.methods.router_method import (
    ChosenRoutersMethod,
    SampledRouterMethod,
    check_scores,
    fitted_routers,
    scores_of,
)
from bmoe_lightning.methods.workbench import Workbench
from bmoe_lightning.routers.costs import RouterCost, noise_cost
from bmoe_lightning.routers.fixed_noise import FixedNoise
from bmoe_lightning.routers.gaps import check_gaps
from bmoe_lightning.routers.types import Router


@dataclass(frozen=True)
class RouterNoise(ChosenRoutersMethod, SampledRouterMethod):
    """Averages predictions over `num_samples` routes, sampled by Gaussian noise on the logits of routers.

    Nothing is trained. The standard deviation in a layer is one number, fitted on held-out labels, times the layer's
    median gap between the K-th and the next largest router logit, so that it changes about as many choices in every
    layer. A trained distribution over routes has to beat this one.

    With `average="scores"` the routers' scores are averaged in place of predictions, in a single pass, as in the papers
    on Bayesian routers. Since that leaves the order of experts as it is, the same experts are chosen and their weights
    are flatter: no average over models. It needs a name of its own. An average of logits would be the model itself.

    The variance of router logits, with other routers a score of uncertainty, is the same for all inputs here.

    Raises:
        ValueError: If there is less than one sample, a scale is not positive, or an option is unknown.
    """

    name: str = "router_noise"
    label: str = "Router noise"
    scales: tuple[float, ...] = option(
        (0.5, 1.0, 2.0, 3.0, 4.0, 6.0),
        "Candidates for the scale of the noise, in units of each layer's gap; 0, the model itself, is another one.",
        trial=(1.0,),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "scales", tuple(self.scales))
        check_scales(self.scales)

    @property
    def needs(self) -> Needs:
        return Needs(calibration_labels=True, advised_labels=25, routers=True)

    def check_routers(self, model: nn.Module, routers: Sequence[Router], run: Callable[[], Tensor]) -> None:
        super().check_routers(model, routers, run)
        check_gaps(routers)

    def fit(self, work: Workbench) -> State:
        routers, gaps = work.routers(), work.router_gaps()
        chosen, unit = self.chosen(routers), torch.zeros_like(gaps)
        indices = [router.index for router in chosen]
        unit[indices] = gaps[indices]
        scales = [0.0, *sorted(self.scales)]

        def averaged(view: BatchView) -> Tensor:
            return torch.stack([self.predicted(view, noise_nets(routers, (scale * unit).tolist())) for scale in scales])

        if self.average == "predictions":
            plain, routes, labels = self._noise_routes.held_out(work, scales[1:], unit)
            log_probs = torch.stack([plain, *map(average_log_probs, routes)])
        else:
            log_probs, labels = work.held_out_log_probs(averaged)
        nll = -log_probs.gather(2, labels.expand(len(scales), -1).unsqueeze(2)).mean((1, 2))
        scale = scales[int(nll.argmin())]
        if scale == 0:
            work.warn(
                "the noise of the routers is fitted as 0: none of the scales lowers the NLL of the held-out labels, so "
                "the predictions are those of the model itself"
            )
        warn_of_scale(work, scale, scales[-1], chosen)
        return {"scale": scalar(scale), "unit": unit, "sigma": scale * unit, "score": scores_of(routers)}

    def make_nets(self, batch: BatchView, state: State) -> list[FixedNoise]:
        return noise_nets(fitted_routers(batch, state["score"]), state["sigma"].tolist())

    def check_state(self, state: State) -> None:
        super().check_state(state)
        check_noise_state(state)
        check_scores(state.get("score"), len(state["sigma"]))

    def token_cost(self, d_in: int, num_experts: int, num_samples: int) -> RouterCost:
        return noise_cost(num_experts, num_samples)

    def num_parameters(self, d_in: int, num_experts: int) -> int:
        return 1

    def hyperparameters(self, state: State) -> dict[str, float]:
        return {"num_samples": self.num_samples, **state_numbers({key: state[key] for key in ("scale", "sigma")})}

    @property
    def _noise_routes(self) -> NoiseRoutes:
        return NoiseRoutes(self.num_samples, self.antithetic, self.samples_per_pass)

    def _routes(self, batch: BatchView, state: State) -> Tensor:
        return self._noise_routes.log_probs(batch, state["sigma"])  # which other methods share
