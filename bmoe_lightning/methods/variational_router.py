"""What methods share that train a distribution over router logits, or over choices of experts."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bmoe_lightning.experts.fsdp import has_shards, unsharded_class
from bmoe_lightning.methods.base import State, check_choice, state_numbers
from bmoe_lightning.methods.batch_view import BatchView
from bmoe_lightning.methods.needs import Needs
from bmoe_lightning.methods.noise_routes import warn_of_still
from bmoe_lightning.methods.options import option
from bmoe_lightning.methods.router_method import SampledRouterMethod, on_devices
from bmoe_lightning.methods.router_schedule import RouterTrainingOptions
from bmoe_lightning.methods.router_training import RouterTrainingResult
from bmoe_lightning.methods.trained_router import TrainedRouterMethod
from bmoe_lightning.methods.workbench import Workbench
from bmoe_lightning.routers.attached import BayesianRouters, attached_routers
from bmoe_lightning.routers.base import (
    BayesianRouter,
    load_router_state,
    router_state,
    trained_dtype,
)
from bmoe_lightning.routers.discovery import find_routers
from bmoe_lightning.routers.gaps import check_gaps
from bmoe_lightning.routers.types import Router
from bmoe_lightning.utils.messages import first_names

PriorUnit = Literal["gap", "one"]
Training = Literal["post_hoc", "with_model"]


@dataclass(frozen=True)
class VariationalRouterMethod(TrainedRouterMethod, SampledRouterMethod):
    """Bayesian routers with a penalty, which starts at the prior, and their training.

    Or those that a `RouterFinetuner` or `RouterTrainingCallback` has trained beside the model, and maybe with it; then
    options of the training, and of the prior, are those of that class, and `fit` checks that kind and layers agree.

    Raises:
        ValueError: If `beta` is negative or infinite, or `hidden` below 1.
    """

    beta: float = option(
        0.1, "What multiplies the penalty, a mean over tokens in nats that is summed over the routers."
    )
    hidden: int | None = option(
        None, "Width of the hidden layers of the routers' networks; by default a quarter of the router's input."
    )
    training: Training = option(
        "post_hoc",
        "Who trains the routers: the fit, `post_hoc`, or the module that trains the model, `with_model`.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("training", self.training, get_args(Training))
        if not 0 <= self.beta < math.inf:
            raise ValueError(f"{self.name} needs a finite beta >= 0, got {self.beta}")
        if self.hidden is not None and self.hidden < 1:
            raise ValueError(f"{self.name} needs hidden layers of a width of at least 1, got hidden={self.hidden}")

    @property
    def needs(self) -> Needs:
        if self.training == "with_model":
            return Needs(calibration_labels=True, routers=True)
        return super().needs

    def check_run(
        self,
        model: nn.Module,
        folder: Path | None,
        *,
        ranks_per_node: int = 1,
        trained: Sequence[nn.Parameter] | None = None,
    ) -> None:
        """As `TrainedRouterMethod.check_run`.

        Raises:
            ValueError: Also if no Bayesian routers are trained with the model that should be, or others.
        """
        super().check_run(model, folder, ranks_per_node=ranks_per_node, trained=trained)
        if self.training == "with_model":
            own = [self.make_net(router, 1.0, False, torch.float32, 0) for router in self.chosen(find_routers(model))]
            self._check_alike(own, self._given(model).nets)

    def check_routers(self, model: nn.Module, routers: Sequence[Router], run: Callable[[], Tensor]) -> None:
        super().check_routers(model, routers, run)
        check_gaps(routers)

    def modules_beside(self, model: nn.Module) -> Sequence[nn.Module]:
        return [self._given(model)] if self.training == "with_model" else []

    @abstractmethod
    def make_net(self, router: Router, unit: float, way: bool, dtype: torch.dtype, seed: int) -> BayesianRouter:
        """The Bayesian router beside a router, before training.

        Args:
            router: The router, probed.
            unit: Its median gap between the K-th and the next largest logit.
            way: Whether choices replace what routers return; see `choice_ways`.
            dtype: Dtype of the trained part.
            seed: Seed of its first weights.
        """

    def fit(self, work: Workbench) -> State:
        chosen, units, way = self.chosen(work.routers()), work.router_gaps(), self.way(work)
        nets = on_devices(
            work.model,
            [
                self.make_net(router, float(units[router.index]), way, trained_dtype(work.model, router), work.seed)
                for router in chosen
            ],
        )
        warn_of_still(work, [net.router for net in nets if net.is_still], len(nets))
        random = [net for net in nets if not net.is_still]
        predict = self.predicted_in_training(nets)
        if self.training == "with_model":
            found = self._taken(work, nets, predict)
        else:
            key, options = self.training_key, self.training_options
            found = work.router_passes.train(key, random, options, predict, predict_key=self.held_out_key)
            self._warn(work, found)
        return {"unit": units, "way": torch.tensor(int(way)), **self.state_of(work, found.state, found)}

    @property
    def training_options(self) -> RouterTrainingOptions:
        return replace(super().training_options, beta=self.beta)

    def way(self, work: Workbench) -> bool:
        """Whether random choices of experts replace what routers return; False where logits are random."""
        return False

    def stored_net(self, router: Router, state: State) -> BayesianRouter:
        return self.make_net(router, float(state["unit"][router.index]), bool(state["way"]), torch.float32, 0)

    @property
    def loss_counts(self) -> Collection[int]:
        return (1,) if self.training == "with_model" else super().loss_counts

    def check_state(self, state: State) -> None:
        unit, way = state.get("unit"), state.get("way")
        if unit is None or unit.dtype != torch.float64 or unit.dim() != 1 or bool((unit < 0).any()):
            raise ValueError("'unit' must be float64, of one dimension and not negative")
        if len(unit) != len(state.get("score", ())):
            raise ValueError("'unit' must have an entry for each router")
        if way is None or way.dtype != torch.int64 or way.dim() or int(way) not in (0, 1):
            raise ValueError("'way' must be 0 or 1")
        super().check_state(state)

    def hyperparameters(self, state: State) -> dict[str, float]:
        numbers = super().hyperparameters(state)
        if self.training == "with_model":
            numbers = {name: value for name, value in numbers.items() if not name.startswith("held_out_nll_untrained")}
        return numbers

    def _given(self, model: nn.Module) -> BayesianRouters:
        """The Bayesian routers that stand beside a model."""
        found = attached_routers(model)
        if found is None:
            raise ValueError(
                f"{self.name} with training='with_model' predicts with Bayesian routers that were trained beside the "
                f"model, and {type(model).__name__} has none; train it with RouterFinetuner or RouterTrainingCallback, "
                "or set training='post_hoc'"
            )
        return found

    def _check_alike(self, own: Sequence[BayesianRouter], given: Sequence[BayesianRouter]) -> None:
        """Refuse Bayesian routers beside the model that are others than those of the method."""
        here, there = ([(_kind(net), net.router.index) for net in of] for of in (own, given))
        if here != there:
            raise ValueError(
                f"{self.name} has routers {_shown(here)}, and those that are trained beside the model are "
                f"{_shown(there)}; use the method of their kind, with the same layers"
            )
        for one, other in zip(own, given, strict=True):
            if has_shards(other):
                continue
            expected, found = (
                {name: tuple(value.shape) for name, value in net.state_dict().items()} for net in (one, other)
            )
            if expected != found:
                name = next(name for name in {**expected, **found} if expected.get(name) != found.get(name))
                raise ValueError(
                    f"{self.name} has routers with a tensor {name!r} of shape {expected.get(name)}, and those that are "
                    f"trained beside the model have {found.get(name)}; give both the same rank, and the same hidden, "
                    "the width of their hidden layers"
                )

    def _taken(
        self, work: Workbench, nets: Sequence[BayesianRouter], predict: Callable[[BatchView], Tensor]
    ) -> RouterTrainingResult:
        """Give routers the values of those beside the model, and measure their held-out loss."""
        given = self._given(work.model)
        self._check_alike(nets, given.nets)
        if given.lacks_scale:
            raise ValueError(
                f"{self.name} predicts with Bayesian routers that were trained beside the model, and those of "
                f"{type(work.model).__name__} have not seen a training step; train them, or set training='post_hoc'"
            )
        state = router_state(given.nets)
        load_router_state(nets, state)
        on_devices(work.model, nets)
        log_probs, labels = work.held_out_log_probs(lambda view: predict(view).unsqueeze(0))
        return RouterTrainingResult(state, 0, (float(F.nll_loss(log_probs[0], labels)),), {})

    def _warn(self, work: Workbench, found: RouterTrainingResult) -> None:
        """Say where training did no good."""
        if len(found.losses) > 1 and not found.epoch:
            work.warn(
                f"no epoch of training made the routers of {self.name} better than untrained noise on the held-out "
                f"labels (NLL {min(found.losses[1:]):.4f}, untrained {found.losses[0]:.4f}), so they are untrained; "
                "train them jointly with the experts, or on data that the model has not memorised"
            )
        ratio = found.statistics.get("scale_ratio", ())
        if found.epoch and ratio and sum(ratio) / len(ratio) < 0.1:
            work.warn(
                f"the noise of the routers of {self.name} has shrunk to {sum(ratio) / len(ratio):.2g} of its prior "
                "scale, so that routes hardly differ; raise beta"
            )


@dataclass(frozen=True)
class GaussianRouterMethod(VariationalRouterMethod):
    """Bayesian routers with a Gaussian over the logits, whose prior is a multiple of each router's own unit.

    Raises:
        ValueError: If the scale is not positive or the unit unknown.
    """

    prior_scale: float = option(2.0, "Standard deviation of each logit under the prior, in units of `prior_unit`.")
    prior_unit: PriorUnit = option(
        "gap",
        "`gap`: the router's median gap between the K-th and the next largest logit, so that noise changes about as "
        "many choices in every layer; `one`: 1 for all, as in the papers, which is random routing where logits are "
        "small.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("prior_unit", self.prior_unit, get_args(PriorUnit))
        if not 0 < self.prior_scale < float("inf"):
            raise ValueError(f"prior_scale must be a positive number, got {self.prior_scale}")

    reported = ("kl", "scale_ratio")

    def num_parameters(self, d_in: int, num_experts: int) -> int:
        return self.token_cost(d_in, num_experts, 0).linear + 1  # the heads and the prior's scale

    def hyperparameters(self, state: State) -> dict[str, float]:
        scales = [value for name, value in state.items() if name.endswith(".prior_scale")]
        prior = {"prior_scale": torch.stack(scales)} if scales else {}
        return {**super().hyperparameters(state), **state_numbers(prior)}

    def scale_of(self, unit: float) -> float:
        """The standard deviation of each logit of a router under the prior, given its gap."""
        return self.prior_scale * (unit if self.prior_unit == "gap" else 1.0)


def _kind(net: BayesianRouter) -> str:
    return unsharded_class(net).__name__


def _shown(routers: Sequence[tuple[str, int]]) -> str:
    return first_names(f"{name} of layer {index}" for name, index in routers)
