"""What methods share that train Bayesian routers beside a model that is trained already."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bmoe_lightning.experts.fsdp import unsharded_class
from bmoe_lightning.methods.base import State, check_choice, option, scalar, state_numbers
from bmoe_lightning.methods.batch_view import BatchView
from bmoe_lightning.methods.needs import Needs
from bmoe_lightning.methods.router_method import (
    RouterMethod,
    check_scores,
    fitted_routers,
    on_devices,
    scores_of,
)
from bmoe_lightning.methods.router_training import RouterTrainingOptions, RouterTrainingResult
from bmoe_lightning.methods.workbench import Workbench
from bmoe_lightning.routers.attached import BayesianRouters, attached_routers
from bmoe_lightning.routers.base import (
    BayesianRouter,
    check_router_weights,
    load_router_state,
    router_fingerprint,
    router_state,
    trained_dtype,
)
from bmoe_lightning.routers.discovery import find_routers
from bmoe_lightning.routers.prediction import RouterSignals, mean_routers, recorded_signals
from bmoe_lightning.routers.types import Router
from bmoe_lightning.utils.messages import first_names

PriorUnit = Literal["gap", "one"]
Training = Literal["post_hoc", "with_model"]

_NET = "net."
_LARGEST_HELD_OUT_SAMPLES = 8


@dataclass(frozen=True)
class TrainedRouterMethod(RouterMethod):
    """Bayesian routers that `fit` trains on the training data, the model being frozen.

    Or those that a `RouterFinetuner` or `RouterTrainingCallback` has trained beside the model, and maybe with it; then
    options of the training, and of the prior, are those of that class, and `fit` checks that kind and layers agree.

    The held-out labels choose the epoch, among them the one before training. Then the method is untrained noise, which
    a warning says: on data that a model has memorised, the likelihood wants no noise at all.

    Raises:
        ValueError: If a number is out of range; see `RouterMethod`.
    """

    layers: tuple[int | str, ...] = option(
        (), "The routers that are random, by index or name of the router's module; empty for all of them."
    )
    beta: float = option(
        0.1, "What multiplies the penalty, a mean over tokens in nats that is summed over the routers."
    )
    epochs: int = option(10, "Number of passes over the training data.", trial=1)
    learning_rate: float | None = option(
        None,
        "Largest learning rate, of AdamW with warm-up and half a cosine; by default 0.64 / D for a router input of "
        "width D, so that a step moves the logits about as far whatever the width is.",
    )

    training: Training = option(
        "post_hoc",
        "Who trains the routers: the fit, `post_hoc`, or the module that trains the model, `with_model`.",
    )

    source = "https://arxiv.org/abs/2509.23830"
    cost = "`num_samples` forward passes; one forward pass for `scores`"

    _fewest_samples = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "layers", tuple(self.layers))
        check_choice("training", self.training, get_args(Training))
        rate = 1.0 if self.learning_rate is None else self.learning_rate
        if self.epochs < 0 or not rate > 0 or not self.beta >= 0:
            raise ValueError(
                f"{self.name} needs epochs >= 0, a positive learning rate and beta >= 0, got epochs={self.epochs}, "
                f"learning_rate={self.learning_rate} and beta={self.beta}"
            )

    @property
    def needs(self) -> Needs:
        if self.training == "with_model":
            return Needs(calibration_labels=True, routers=True)
        return Needs(
            calibration_labels=True, advised_labels=25, training_labels=True, routers=True, router_training=True
        )

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
            ValueError: If it has no routers, `layers` names others, they have too many experts, or no Bayesian routers
                are trained with the model that should be.
        """
        if self.training == "with_model":
            self._given(model)
        for router in self.chosen(find_routers(model)):
            self.check_router(router)

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

    def fit(self, work: Workbench) -> State:
        routers = work.routers()
        chosen, units, way = self.chosen(routers), work.router_gaps(), self.way(work)
        nets = on_devices(
            work.model,
            [
                self.make_net(router, float(units[router.index]), way, trained_dtype(work.model, router), work.seed)
                for router in chosen
            ],
        )
        still = [net.router.name for net in nets if net.is_still]
        if still:
            work.warn(
                f"{len(still)} of {len(nets)} routers get no noise, {still[0]!r} for one: at half of the tokens, their "
                "K-th and next largest logits are equal"
            )
        random = [net for net in nets if not net.is_still]
        trial = replace(self, num_samples=min(self.num_samples, _LARGEST_HELD_OUT_SAMPLES))
        if self.training == "with_model":
            found = self._taken(work, nets, trial)
        else:
            found = work.router_passes.train(
                self.training_key, random, self.training_options, lambda view: trial.predicted(view, nets)
            )
            self._warn(work, found)
        return {
            "score": scores_of(routers),
            "top_k": torch.tensor([router.top_k or 0 for router in routers]),
            "unit": units,
            "way": torch.tensor(int(way)),
            "fingerprint": router_fingerprint(work.model, routers),
            "epoch": scalar(found.epoch),
            "held_out_nll": torch.tensor(found.losses, dtype=torch.float64),
            **{name: torch.tensor(values, dtype=torch.float64) for name, values in found.statistics.items()},
            **{f"{_NET}{name}": value for name, value in found.state.items()},
        }

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

    def _taken(
        self, work: Workbench, nets: Sequence[BayesianRouter], trial: TrainedRouterMethod
    ) -> RouterTrainingResult:
        """Give routers the values of those beside the model, and measure their held-out loss."""
        given = self._given(work.model)
        here, there = ([(_kind(net), net.router.index) for net in of] for of in (nets, given.nets))
        if here != there:
            raise ValueError(
                f"{self.name} has routers {_shown(here)}, and those that were trained beside the model are "
                f"{_shown(there)}; use the method of their kind, with the same layers"
            )
        if given.lacks_scale:
            raise ValueError(
                f"{self.name} predicts with Bayesian routers that were trained beside the model, and those of "
                f"{type(work.model).__name__} have not seen a training step; train them, or set training='post_hoc'"
            )
        state = router_state(given.nets)
        load_router_state(nets, state)
        on_devices(work.model, nets)
        log_probs, labels = work.held_out_log_probs(lambda view: trial.predicted(view, nets).unsqueeze(0))
        return RouterTrainingResult(state, 0, (float(F.nll_loss(log_probs[0], labels)),), {})

    @property
    def training_key(self) -> Hashable:
        """What the training depends on: methods that differ in what they average share one."""
        other = {"name", "label", *(entry.name for entry in fields(RouterMethod))}
        return type(self), tuple((e.name, getattr(self, e.name)) for e in fields(self) if e.name not in other)

    @property
    def training_options(self) -> RouterTrainingOptions:
        """The options of the training."""
        return RouterTrainingOptions(self.epochs, self.learning_rate, self.beta)

    def way(self, work: Workbench) -> bool:
        """Whether random choices of experts replace what routers return; False where logits are random."""
        return False

    def make_nets(self, batch: BatchView, state: State) -> list[BayesianRouter]:
        routers = [
            replace(router, top_k=int(top_k) or None)
            for router, top_k in zip(fitted_routers(batch, state["score"]), state["top_k"], strict=True)
        ]
        check_router_weights(batch.model, routers, state["fingerprint"])
        way, units = bool(state["way"]), state["unit"]
        own = {name.removeprefix(_NET): value for name, value in state.items() if name.startswith(_NET)}
        random = {int(name.partition(".")[0]) for name in own}
        nets = [
            self.make_net(router, float(units[router.index]), way, torch.float32, 0)
            for router in self.chosen(routers)
            if router.index in random
        ]
        load_router_state(nets, own)
        return nets

    def uncertainty(self, batch: BatchView, state: State) -> dict[str, Tensor]:
        """Mutual information of label and route, variance of the router logits in closed form, entropy of the gate.

        The last two are means over the random routers, at the last token of each example, from one further pass with
        the routers' means; the variance is left out where the choice alone is random.
        """
        scores = super().uncertainty(batch, state)
        nets = self.nets(batch, state)
        signals = batch.once((self, id(state), "signals"), lambda: _signals(batch, nets))
        for name, of_router in (("logit_variance", signals.variances), ("gate_entropy", signals.entropies)):
            if of_router:
                scores[f"router_{name}"] = _of_examples(of_router, batch)
        return scores

    def check_state(self, state: State) -> None:
        super().check_state(state)
        count = len(state.get("unit", ()))
        check_scores(state.get("score"), count)
        for key, shape in (("top_k", (count,)), ("fingerprint", (32,)), ("way", ()), ("epoch", ())):
            if key not in state or state[key].shape != shape:
                raise ValueError(f"{key!r} must have the shape {list(shape)}")

    def hyperparameters(self, state: State) -> dict[str, float]:
        numbers = {name: state[name] for name in ("epoch", "kl", "scale_ratio", "gate_temperature") if name in state}
        losses = state["held_out_nll"]
        untrained = {"held_out_nll_untrained": float(losses[0])} if self.training == "post_hoc" else {}
        return {
            "num_samples": self.num_samples,
            **untrained,
            "held_out_nll": float(losses.min()),
            **state_numbers({name: value.mean() for name, value in numbers.items()}),
        }

    def _warn(self, work: Workbench, found: RouterTrainingResult) -> None:
        """Say where training did no good."""
        if self.epochs and not found.epoch:
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


def _kind(net: BayesianRouter) -> str:
    return unsharded_class(net).__name__


def _shown(routers: Sequence[tuple[str, int]]) -> str:
    return first_names(f"{name} of layer {index}" for name, index in routers)


def _signals(batch: BatchView, nets: Sequence[BayesianRouter]) -> RouterSignals:
    with torch.no_grad(), recorded_signals(batch.model, nets) as signals, mean_routers(batch.model, nets):
        batch.forward()
    return signals


def _of_examples(of_router: Mapping[int, Sequence[Tensor]], batch: BatchView) -> Tensor:
    """The mean over routers and over the rows of each example, `[B]`."""
    count = len(batch.logits)
    found = []
    for calls in of_router.values():
        for values in calls:
            if len(values) % count:
                raise ValueError(
                    f"the model ran on {len(values)} rows for {count} examples, so it is unknown which rows are those "
                    "of an example; let class_logits run the model on the same number of rows for each example"
                )
            found.append(values.view(count, -1).mean(1).to(batch.logits.device))
    return torch.stack(found).mean(0)


@dataclass(frozen=True)
class GaussianRouterMethod(TrainedRouterMethod):
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

    def num_parameters(self, d_in: int, num_experts: int) -> int:
        return self.token_cost(d_in, num_experts, 0).linear + 1  # the heads and the prior's scale

    def hyperparameters(self, state: State) -> dict[str, float]:
        scales = [value for name, value in state.items() if name.endswith(".prior_scale")]
        prior = {"prior_scale": torch.stack(scales)} if scales else {}
        return {**super().hyperparameters(state), **state_numbers(prior)}

    def scale_of(self, unit: float) -> float:
        """The standard deviation of each logit of a router under the prior, given its gap."""
        return self.prior_scale * (unit if self.prior_unit == "gap" else 1.0)
