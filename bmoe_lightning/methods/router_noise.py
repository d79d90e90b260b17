"""Untrained Gaussian noise on the routers' logits: the control for methods that train a distribution over routes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from bmoe_lightning.methods.base import Method, State, check_choice, option, scalar, state_numbers
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
from bmoe_lightning.methods.routes import located_routers, route_information
from bmoe_lightning.methods.workbench import Workbench
from bmoe_lightning.routers.costs import RoutingCost, noise_cost
from bmoe_lightning.routers.discovery import find_routers
from bmoe_lightning.routers.prediction import averaged_scores
from bmoe_lightning.routers.types import Router, Score

Average = Literal["predictions", "scores"]

_SCORES: tuple[Score, ...] = get_args(Score)
_NAME, _LABEL = "router_noise", "Router noise"


@dataclass(frozen=True)
class RouterNoise(Method):
    """Averages predictions over `num_samples` routes, sampled by Gaussian noise on the logits of every router.

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

    name: str = _NAME
    label: str = _LABEL
    average: Average = option(
        "predictions",
        "What is averaged over the noise: `predictions` of passes along different routes, or router `scores`.",
    )
    num_samples: int = option(16, "Number of samples of the noise.", trial=2)
    scales: tuple[float, ...] = option(
        (0.5, 1.0, 2.0, 3.0, 4.0, 6.0),
        "Candidates for the scale of the noise, in units of each layer's gap; 0, the model itself, is another one.",
    )
    antithetic: bool = option(True, "Whether samples come in pairs of opposite noise, which have less variance.")
    samples_per_pass: int = option(
        1,
        "Number of routes that one forward pass computes, on copies of the batch's rows: faster for small batches on "
        "an accelerator, and for `class_logits` that treat each row alike.",
        prediction_only=True,
    )

    source = "https://arxiv.org/abs/2603.09453"
    cost = "`num_samples` forward passes; one forward pass for `scores`"

    def __post_init__(self) -> None:
        object.__setattr__(self, "scales", tuple(self.scales))
        check_choice("average", self.average, get_args(Average))
        self._noise_routes  # noqa: B018  (checks its options)
        check_scales(self.scales)
        if self.average == "scores" and (self.name == _NAME or self.label == _LABEL):
            raise ValueError(
                "an average of router scores is another method than that of predictions, and must not be taken for it "
                f"in a table; give it a name and a label, such as name='{_NAME}_scores', label='{_LABEL} (scores)'"
            )

    @property
    def needs(self) -> Needs:
        return Needs(calibration_labels=True, advised_labels=25, routers=True)

    def check_run(
        self,
        model: nn.Module,
        folder: Path | None,
        *,
        ranks_per_node: int = 1,
        trained: Sequence[nn.Parameter] | None = None,
    ) -> None:
        """Check that the model has routers.

        Raises:
            ValueError: If it has none, or a kernel replaces them.
        """
        find_routers(model)

    def fit(self, work: Workbench) -> State:
        routers, unit = work.routers(), work.router_gaps()
        scales = [0.0, *sorted(self.scales)]

        def averaged(view: BatchView) -> Tensor:
            return torch.stack([self._averaged_scores(view, routers, scale * unit) for scale in scales])

        if self.average == "predictions":
            plain, routes, labels = self._noise_routes.held_out(work, scales[1:])
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
        warn_of_scale(work, scale, scales[-1])
        scores = torch.tensor([_SCORES.index(router.score or "other") for router in routers])
        return {"scale": scalar(scale), "unit": unit, "sigma": scale * unit, "score": scores}

    def log_probs(self, batch: BatchView, state: State) -> Tensor:
        sigma = state["sigma"]
        if not sigma.any():
            return batch.logits.log_softmax(-1)
        if self.average == "predictions":
            return average_log_probs(self._noise_routes.log_probs(batch, sigma))
        return self._averaged_scores(batch, self._found(batch, state), sigma)

    def uncertainty(self, batch: BatchView, state: State) -> dict[str, Tensor]:
        """Mutual information of label and route in nats; none for averaged scores, which are one pass."""
        if self.average == "scores":
            return {}
        if not state["sigma"].any():
            return {"mutual_information": batch.logits.new_zeros(len(batch.logits))}
        return {"mutual_information": route_information(self._noise_routes.log_probs(batch, state["sigma"]))}

    def check_state(self, state: State) -> None:
        super().check_state(state)
        check_noise_state(state)
        scores = state.get("score")
        if scores is None or scores.shape != state["sigma"].shape:
            raise ValueError("'score' and 'sigma' must have an entry for each router")
        if bool(((scores < 0) | (scores >= len(_SCORES))).any()):
            raise ValueError(f"'score' must be an index of {', '.join(_SCORES)}")

    def routing_cost(self, d_in: int, num_experts: int) -> RoutingCost:  # the same for all widths
        """What a prediction takes in a router with inputs of a width; see `bmoe_lightning.methods.routing_cost`."""
        if self.average == "predictions":
            return RoutingCost(self.num_samples, noise_cost(num_experts, 1), parameters=1)
        return RoutingCost(1, noise_cost(num_experts, self.num_samples), parameters=1)

    def hyperparameters(self, state: State) -> dict[str, float]:
        return {"num_samples": self.num_samples, **state_numbers({key: state[key] for key in ("scale", "sigma")})}

    @property
    def _noise_routes(self) -> NoiseRoutes:
        return NoiseRoutes(self.num_samples, self.antithetic, self.samples_per_pass)

    def _averaged_scores(self, batch: BatchView, routers: Sequence[Router], sigma: Tensor) -> Tensor:
        if not sigma.any():
            return batch.logits.log_softmax(-1)
        noise = self._noise_routes.noise(batch)
        with averaged_scores(batch.model, noise_nets(routers, sigma.tolist()), self.num_samples, noise):
            return batch.forward()[0].log_softmax(-1)

    def _found(self, batch: BatchView, state: State) -> list[Router]:
        scores = [_SCORES[index] for index in state["score"].tolist()]
        routers = located_routers(batch, len(scores))
        return [replace(router, score=score) for router, score in zip(routers, scores, strict=True)]
