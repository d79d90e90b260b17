"""What methods with random routers share: predictions along sampled routes, or averaged scores in one pass."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from bmoe_lightning.experts.fsdp import has_shards
from bmoe_lightning.experts.write_counts import weights_state
from bmoe_lightning.methods.base import Method, State, check_choice
from bmoe_lightning.methods.batch_view import BatchView
from bmoe_lightning.methods.evaluation import average_log_probs
from bmoe_lightning.methods.options import option
from bmoe_lightning.methods.routes import located_routers, position_noise, route_information, sampled_log_probs
from bmoe_lightning.routers.base import BayesianRouter
from bmoe_lightning.routers.costs import RouterCost, RoutingCost
from bmoe_lightning.routers.discovery import find_routers
from bmoe_lightning.routers.prediction import averaged_scores, mean_routers
from bmoe_lightning.routers.scores import check_score
from bmoe_lightning.routers.types import SCORES, Router
from bmoe_lightning.utils.messages import first_names

Average = Literal["predictions", "scores"]


@dataclass(frozen=True)
class Sampling:
    """How samples of routers make a prediction.

    Attributes:
        average: What is averaged.
        num_samples: Number of samples; 0 for the routers' means.
        antithetic: Whether samples come in pairs of opposite noise.
        samples_per_pass: Number of routes that one forward pass computes.
    """

    average: Average = "predictions"
    num_samples: int = 0
    antithetic: bool = True
    samples_per_pass: int = 1


@dataclass(frozen=True)
class RouterMethod(Method):
    """Predicts with other routers than the model's, or averages over samples of random ones.

    Raises:
        ValueError: If there is less than one sample, an option is unknown, or an average of scores has the name of one
            of predictions.
    """

    source = "https://arxiv.org/abs/2603.09453"

    def __post_init__(self) -> None:
        found = self.sampling
        check_choice("average", found.average, get_args(Average))
        if found.num_samples < self._fewest_samples or found.samples_per_pass < 1:
            raise ValueError(
                f"{self.name} needs at least one sample, got num_samples={found.num_samples} and "
                f"samples_per_pass={found.samples_per_pass}"
            )
        default = {entry.name: entry.default for entry in fields(self)}
        if found.average == "scores" and (self.name == default["name"] or self.label == default["label"]):
            raise ValueError(
                "an average of router scores is another method than that of predictions, and must not be taken for it "
                f"in a table; give it a name and a label, such as name='{default['name']}_scores', "
                f"label='{default['label']} (scores)'"
            )

    @property
    @abstractmethod
    def sampling(self) -> Sampling:
        """How samples of the routers make a prediction."""

    _fewest_samples = 1

    @abstractmethod
    def make_nets(self, batch: BatchView, state: State) -> Sequence[BayesianRouter]:
        """The Bayesian routers of a state, on any device.

        Args:
            batch: View of a batch of the model.
            state: State from `fit`.

        Raises:
            ValueError: If the state is that of other routers.
        """

    @abstractmethod
    def token_cost(self, d_in: int, num_experts: int, num_samples: int) -> RouterCost:
        """What one router adds for one token in one forward pass; see `bmoe_lightning.routers.costs`.

        Args:
            d_in: Width of the router's input.
            num_experts: Number of its logits.
            num_samples: Number of samples that it averages.
        """

    @abstractmethod
    def num_parameters(self, d_in: int, num_experts: int) -> int:
        """Number of numbers that are stored for one router."""

    def routing_cost(self, d_in: int, num_experts: int) -> RoutingCost:
        """What a prediction takes in a router with inputs of a width; see `bmoe_lightning.methods.routing_cost`."""
        count = self.sampling.num_samples
        passes, samples = (count, 1) if self.sampling.average == "predictions" else (1, count)
        cost = self.token_cost(d_in, num_experts, samples)
        return RoutingCost(max(1, passes), cost, parameters=self.num_parameters(d_in, num_experts))

    def check_routers(self, model: nn.Module, routers: Sequence[Router], run: Callable[[], Tensor]) -> None:
        """Refuse an average of scores that are neither a softmax nor a sigmoid; `Method.check_routers` has the rest."""
        if self.sampling.average == "scores":
            for router in routers:
                check_score(router.score)

    def log_probs(self, batch: BatchView, state: State) -> Tensor:
        nets = self.nets(batch, state)
        if self.sampling.average == "predictions" and self.sampling.num_samples and not _are_still(nets):
            return average_log_probs(self._routes(batch, state))
        return self.predicted(batch, nets)

    def uncertainty(self, batch: BatchView, state: State) -> dict[str, Tensor]:
        """Mutual information of label and route in nats; none for averaged scores, which are one pass."""
        if self.sampling.average == "scores":
            return {}
        if not self.sampling.num_samples or _are_still(self.nets(batch, state)):
            return {"mutual_information": batch.logits.new_zeros(len(batch.logits))}
        return {"mutual_information": route_information(self._routes(batch, state))}

    def predicted(self, batch: BatchView, nets: Sequence[BayesianRouter], sampling: Sampling | None = None) -> Tensor:
        """Log-probabilities `[B, K]` under some Bayesian routers, which `fit` may be trying.

        Args:
            batch: View of the batch.
            nets: The routers, on the model's devices.
            sampling: How samples make a prediction; by default as in predictions of the method.
        """
        sampling = self.sampling if sampling is None else sampling
        if _are_still(nets):
            return batch.logits.log_softmax(-1)
        if not sampling.num_samples:
            with mean_routers(batch.model, nets):
                return batch.forward()[0].log_softmax(-1)
        if sampling.average == "predictions":
            return average_log_probs(_sampled(batch, nets, sampling))
        noise = position_noise(batch, antithetic=sampling.antithetic)
        with averaged_scores(batch.model, nets, sampling.num_samples, noise):
            return batch.forward()[0].log_softmax(-1)

    def nets(self, batch: BatchView, state: State) -> Sequence[BayesianRouter]:
        """The Bayesian routers of a state, made once for all batches while the weights of the routers are the same."""
        known: _Made | None = batch.lasting.get(self)
        if known is None or known.state is not state or known.weights != _weights(batch.model, known.nets):
            nets = on_devices(batch.model, self.make_nets(batch, state))
            known = batch.lasting[self] = _Made(state, _weights(batch.model, nets), nets)
        return known.nets

    def _routes(self, batch: BatchView, state: State) -> Tensor:
        """Log-probabilities `[S, B, K]` along each route, computed once for predictions and scores of uncertainty."""
        nets = self.nets(batch, state)
        return batch.once((self, id(state)), lambda: _sampled(batch, nets, self.sampling))


@dataclass(frozen=True)
class ChosenRoutersMethod(RouterMethod):
    """Replaces some or all of the routers of a model; the others stay as they are.

    Raises:
        ValueError: See `RouterMethod`.
    """

    layers: tuple[int | str, ...] = option(
        (), "The routers that are random, by index or name of the router's module; empty for all of them."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "layers", tuple(self.layers))

    def check_run(
        self,
        model: nn.Module,
        folder: Path | None,
        *,
        ranks_per_node: int = 1,
        trained: Sequence[nn.Parameter] | None = None,
    ) -> None:
        """Check that the model has the routers, and that these can be random.

        Raises:
            ValueError: If it has no routers, `layers` names others, or they have too many experts.
        """
        for router in self.chosen(find_routers(model)):
            self.check_router(router)

    def check_routers(self, model: nn.Module, routers: Sequence[Router], run: Callable[[], Tensor]) -> None:
        super().check_routers(model, self.chosen(routers), run)

    def check_router(self, router: Router) -> None:
        """Check a router that is not probed, before training.

        Raises:
            ValueError: If it has too many experts.
        """

    def chosen(self, routers: Sequence[Router]) -> list[Router]:
        """The routers that are random.

        Args:
            routers: All routers of the model.

        Raises:
            ValueError: If `layers` names one that does not exist.
        """
        known: dict[int | str, int] = {r.index: r.index for r in routers} | {r.name: r.index for r in routers}
        unknown = [layer for layer in self.layers if layer not in known]
        if unknown:
            raise ValueError(
                f"layers of {self.name} names {unknown[0]!r}, and the model has the routers 0 to {len(routers) - 1}, "
                f"such as {first_names(router.name for router in routers)}; use their indices or names"
            )
        indices = {known[layer] for layer in self.layers}
        return [router for router in routers if not indices or router.index in indices]


@dataclass(frozen=True)
class SampledRouterMethod(RouterMethod):
    """Averages over `num_samples` samples of random routers: of predictions along as many routes, or of router scores.

    With `average="scores"` the routers' scores are averaged in place of predictions, in a single pass, as in the papers
    on Bayesian routers. It needs a name of its own. An average of logits would be the model itself.

    Raises:
        ValueError: If there is less than one sample, or an option is unknown.
    """

    average: Average = option(
        "predictions",
        "What is averaged over the noise: `predictions` of passes along different routes, or router `scores`.",
    )
    num_samples: int = option(16, "Number of samples of the noise.", trial=2)
    antithetic: bool = option(True, "Whether samples come in pairs of opposite noise, which have less variance.")
    samples_per_pass: int = option(
        1,
        "Number of routes that one forward pass computes, on copies of the batch's rows: faster for small batches on "
        "an accelerator, and for `class_logits` that treat each row alike.",
        prediction_only=True,
    )

    cost = "`num_samples` forward passes; one forward pass for `scores`"

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.average, self.num_samples, self.antithetic, self.samples_per_pass)


def _sampled(batch: BatchView, nets: Sequence[BayesianRouter], sampling: Sampling) -> Tensor:
    return sampled_log_probs(
        batch, nets, sampling.num_samples, antithetic=sampling.antithetic, per_pass=sampling.samples_per_pass
    )


@dataclass(frozen=True)
class _Made:
    """Bayesian routers, and what they were made of."""

    state: State
    weights: tuple[object, ...]
    nets: Sequence[BayesianRouter]


def _weights(model: nn.Module, nets: Sequence[BayesianRouter]) -> tuple[object, ...]:
    """What tells whether the weights of routers have changed; nothing where they are sharded, and move at each call."""
    if has_shards(model):
        return ()
    return tuple(weights_state(model.get_submodule(net.router.name)) for net in nets)


def on_devices(model: nn.Module, nets: Sequence[BayesianRouter]) -> list[BayesianRouter]:
    """Bayesian routers on the devices of their routers.

    Args:
        model: The model.
        nets: The routers.
    """
    for net in nets:
        weight = next(model.get_submodule(net.router.name).parameters(), None)
        if weight is not None and weight.device.type != "meta":
            net.to(weight.device)
    return list(nets)


def fitted_routers(batch: BatchView, scores: Tensor) -> list[Router]:
    """The routers of a model with the scores that were measured in the fit.

    Args:
        batch: View of a batch of the model.
        scores: What `scores_of` gave.

    Raises:
        ValueError: If the model has another number of routers than that of the fit.
    """
    found = zip(located_routers(batch, len(scores)), scores.tolist(), strict=True)
    return [replace(router, score=SCORES[score]) for router, score in found]


def scores_of(routers: Sequence[Router]) -> Tensor:
    """The scores of routers as numbers, for a state."""
    return torch.tensor([SCORES.index(router.score or "other") for router in routers])


def check_scores(scores: Tensor | None, count: int) -> None:
    """Check what `scores_of` gave, read from a file.

    Raises:
        ValueError: If it is missing or no such numbers.
    """
    if scores is None or scores.shape != (count,) or scores.dtype != torch.int64:
        raise ValueError("'score' must be int64 and have an entry for each router")
    if bool(((scores < 0) | (scores >= len(SCORES))).any()):
        raise ValueError(f"'score' must be an index of {', '.join(SCORES)}")


def _are_still(nets: Sequence[BayesianRouter]) -> bool:
    return all(net.is_still for net in nets)
