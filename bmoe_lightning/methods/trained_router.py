"""What methods share that train Bayesian routers beside a model that is trained already."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import torch
from torch import Tensor

from bmoe_lightning.methods.base import State, scalar, state_numbers
from bmoe_lightning.methods.batch_view import BatchView
from bmoe_lightning.methods.needs import Needs
from bmoe_lightning.methods.options import option
from bmoe_lightning.methods.router_method import (
    ChosenRoutersMethod,
    SampledRouterMethod,
    Sampling,
    check_scores,
    fitted_routers,
    scores_of,
)
from bmoe_lightning.methods.router_schedule import RouterTrainingOptions
from bmoe_lightning.methods.router_training import RouterTrainingResult
from bmoe_lightning.methods.workbench import Workbench
from bmoe_lightning.routers.base import (
    BayesianRouter,
    RouterState,
    check_router_state,
    check_router_weights,
    load_router_state,
    router_fingerprint,
)
from bmoe_lightning.routers.prediction import RouterSignals, mean_routers, recorded_signals
from bmoe_lightning.routers.types import SCORES, Router

_NET = "net."
_LARGEST_HELD_OUT_SAMPLES = 8


@dataclass(frozen=True)
class TrainedRouterMethod(ChosenRoutersMethod):
    """Bayesian routers that `fit` trains on the training data, the model being frozen.

    The held-out labels choose the epoch, among them the one before training. Then the method is untrained noise, which
    a warning says: on data that a model has memorised, the likelihood wants no noise at all.

    Raises:
        ValueError: If a number is out of range; see `RouterMethod`.
    """

    epochs: int = option(10, "Number of passes over the training data.", trial=1)
    learning_rate: float | None = option(
        None,
        "Largest learning rate, of AdamW with warm-up and half a cosine; by default 0.64 / D for a router input of "
        "width D, so that a step moves the logits about as far whatever the width is.",
    )

    source = "https://arxiv.org/abs/2509.23830"

    _fewest_samples = 0

    reported: ClassVar[tuple[str, ...]] = ()
    """Statistics of the training that are among the hyperparameters, not negative."""

    def __post_init__(self) -> None:
        super().__post_init__()
        rate = 1.0 if self.learning_rate is None else self.learning_rate
        if self.epochs < 0 or not 0 < rate < math.inf:
            raise ValueError(
                f"{self.name} needs epochs >= 0 and a positive learning rate, got epochs={self.epochs} and "
                f"learning_rate={self.learning_rate}"
            )

    @property
    def needs(self) -> Needs:
        return Needs(
            calibration_labels=True,
            advised_labels=25,
            training_labels=self.epochs > 0,
            routers=True,
            router_training=True,
        )

    @property
    def training_options(self) -> RouterTrainingOptions:
        """The options of the training."""
        return RouterTrainingOptions(self.epochs, self.learning_rate)

    @property
    def held_out_sampling(self) -> Sampling:
        """How samples make a prediction of the held-out data, by which a fit chooses: few, and at least one.

        So a method that predicts with the routers' means has the routers that are chosen for their samples, if these
        are as many.
        """
        count = self.sampling.num_samples or _LARGEST_HELD_OUT_SAMPLES
        return replace(self.sampling, num_samples=min(count, _LARGEST_HELD_OUT_SAMPLES))

    @property
    def held_out_key(self) -> Hashable:
        """What predictions of the held-out data depend on; methods with equal ones share them."""
        return self.training_key, self.held_out_sampling

    def predicted_in_training(self, nets: Sequence[BayesianRouter]) -> Callable[[BatchView], Tensor]:
        """Log-probabilities `[B, K]` of a held-out batch under routers that are trained.

        Methods with an equal `held_out_key` share them, so that it has to tell everything that they depend on.
        """
        return lambda view: self.predicted(view, nets, self.held_out_sampling)

    def state_of(self, work: Workbench, state: RouterState, found: RouterTrainingResult) -> dict[str, Tensor]:
        """What a state has of the routers of a model, and of their training.

        Args:
            work: Workbench of the fit.
            state: State of the Bayesian routers; see `router_state`.
            found: Result of the training.
        """
        routers = work.routers()
        return {
            "score": scores_of(routers),
            "top_k": torch.tensor([router.top_k or 0 for router in routers]),
            "sizes": torch.tensor([[router.num_experts, router.d_in] for router in routers]),
            "random": torch.tensor(sorted({int(name.partition(".")[0]) for name in state}), dtype=torch.int64),
            "fingerprint": router_fingerprint(work.model, routers),
            "epoch": scalar(found.epoch),
            "held_out_nll": torch.tensor(found.losses, dtype=torch.float64),
            **{name: torch.tensor(values, dtype=torch.float64) for name, values in found.statistics.items()},
            **{f"{_NET}{name}": value for name, value in state.items()},
        }

    @property
    def training_key(self) -> Hashable:
        """What the training depends on: methods that differ in what they average share one."""
        other = {"name", "label", *(entry.name for entry in fields(SampledRouterMethod))}
        return type(self), tuple((e.name, getattr(self, e.name)) for e in fields(self) if e.name not in other)

    @abstractmethod
    def stored_net(self, router: Router, state: State) -> BayesianRouter:
        """A Bayesian router with parameters and buffers of the shapes of a state.

        Args:
            router: The router.
            state: State from `fit`.
        """

    def make_nets(self, batch: BatchView, state: State) -> list[BayesianRouter]:
        routers = [
            replace(router, top_k=int(top_k) or None)
            for router, top_k in zip(fitted_routers(batch, state["score"]), state["top_k"], strict=True)
        ]
        check_router_weights(batch.model, routers, state["fingerprint"])
        nets = self._stored_nets(routers, state)
        load_router_state(nets, _net_state(state))
        return nets

    def _stored_nets(self, routers: Sequence[Router], state: State) -> list[BayesianRouter]:
        """The Bayesian routers of a state beside routers of a model, not loaded."""
        return [self.stored_net(routers[index], state) for index in state["random"].tolist()]

    def uncertainty(self, batch: BatchView, state: State) -> dict[str, Tensor]:
        """Mutual information of label and route, variance of the router logits in closed form, entropy of the gate.

        The last two are means over the random routers, at the last token of each example, from one further pass with
        the routers' means; the variance is left out where the choice alone is random.
        """
        scores = super().uncertainty(batch, state)
        nets = self.nets(batch, state)
        signals = batch.once((self, id(state), "signals"), lambda: _signals(batch, nets))
        for name, of_router in (("logit_variance", signals.variances), ("gate_entropy", signals.entropies)):
            values = _of_examples(of_router, batch) if of_router else None
            if values is not None:
                scores[f"router_{name}"] = values
        return scores

    def check_state(self, state: State) -> None:
        super().check_state(state)
        count = len(state.get("score", ()))
        check_scores(state.get("score"), count)
        whole = torch.int64
        for key, shape, dtype in (
            ("top_k", (count,), whole),
            ("sizes", (count, 2), whole),
            ("fingerprint", (32,), torch.uint8),
            ("epoch", (), torch.float64),
        ):
            value = state.get(key)
            if value is None or value.shape != shape or value.dtype != dtype:
                raise ValueError(f"{key!r} must be {dtype} of the shape {list(shape)}")
        sizes, top_k = state["sizes"], state["top_k"]
        if bool((sizes < 1).any()) or bool(((top_k < 0) | (top_k > sizes[:, 0])).any()):
            raise ValueError("'sizes' must be positive, and 'top_k' from 0 to the number of experts")
        if float(state["epoch"]) not in range(self.epochs + 1):
            raise ValueError(f"'epoch' must be one of 0 to {self.epochs}, and is {float(state['epoch']):g}")
        self._check_statistics(state)
        self._check_nets(state)

    @property
    def chooses_epoch(self) -> bool:
        """Whether the held-out losses are those of each epoch, of which the least is the method's, and not the last."""
        return True

    @property
    def loss_counts(self) -> Collection[int]:
        """The numbers of held-out losses that a state may have: that before training, and one after each epoch.

        Where they choose no epoch, that of the model, and of the method.
        """
        return (self.epochs + 1,) if self.chooses_epoch else (2,)

    def _check_statistics(self, state: State) -> None:
        losses = state.get("held_out_nll")
        count = len(state.get("random", ()))
        counts = self.loss_counts if count else {1, *self.loss_counts}  # routers without noise are not trained
        if losses is None or losses.dtype != torch.float64 or losses.dim() != 1 or len(losses) not in counts:
            raise ValueError(f"'held_out_nll' must be float64, of {' or '.join(map(str, counts))} numbers")
        if self.chooses_epoch and float(state["epoch"]) >= len(losses):
            raise ValueError(f"'epoch' is {float(state['epoch']):g}, and there are {len(losses)} held-out losses")
        trained = self.reported if float(state["epoch"]) else ()
        for name in (*trained, *(name for name in self.reported if name in state and name not in trained)):
            value = state.get(name)
            if value is None or value.dtype != torch.float64 or value.shape != (count,):
                raise ValueError(f"{name!r} must be float64 and have an entry for each random router")
        for name in ("held_out_nll", *self.reported):
            if name in state and bool((state[name] < 0).any()):
                raise ValueError(f"{name!r} must not be negative")

    def _check_nets(self, state: State) -> None:
        """Check that a state has the tensors of its Bayesian routers, with values that they may have."""
        random, tensors = state.get("random"), _net_state(state)
        found = sorted({int(name.partition(".")[0]) for name in tensors})
        if random is None or random.dtype != torch.int64 or random.tolist() != found:
            raise ValueError(f"'random' must be the indices of the routers that it has tensors of, {found}")
        if found and found[-1] >= len(state["score"]):
            raise ValueError(f"it has tensors of router {found[-1]}, and scores of {len(state['score'])} routers")
        rows = zip(state["sizes"].tolist(), state["top_k"].tolist(), state["score"].tolist(), strict=True)
        routers = [
            Router("", index, num_experts, d_in, "", top_k=top_k or None, score=SCORES[score])
            for index, ((num_experts, d_in), top_k, score) in enumerate(rows)
        ]
        nets = self._stored_nets(routers, state)
        check_router_state(nets, tensors)
        wide = {f"{net.router.index}.{name}" for net in nets for name, v in net.state_dict().items() if _is_double(v)}
        dtypes = {value.dtype for name, value in tensors.items() if name not in wide}
        if len(dtypes) > 1 or dtypes - {torch.float32, torch.float64} or not all(_is_double(tensors[n]) for n in wide):
            raise ValueError(f"the tensors of its routers have the dtypes {', '.join(sorted(map(str, dtypes)))}")
        load_router_state(nets, tensors)
        for net in nets:
            for name in net.not_negative:
                if bool((net.get_buffer(name) < 0).any()):
                    raise ValueError(f"{name!r} of router {net.router.index} must not be negative")

    def hyperparameters(self, state: State) -> dict[str, float]:
        numbers = {name: state[name] for name in ("epoch", *self.reported) if name in state}
        losses = state["held_out_nll"].tolist()
        own = losses[int(state["epoch"])] if self.chooses_epoch else losses[-1]
        # That of the means was not measured.
        of_samples = "" if self.sampling.num_samples or not self.held_out_sampling.num_samples else "_of_samples"
        held_out = {f"held_out_nll_untrained{of_samples}": losses[0], f"held_out_nll{of_samples}": own}
        return {
            "num_samples": self.sampling.num_samples,
            **held_out,
            **state_numbers({name: value.mean() for name, value in numbers.items()}),
        }


def _net_state(state: State) -> dict[str, Tensor]:
    """The tensors of the Bayesian routers in a state; see `router_state`."""
    return {name.removeprefix(_NET): value for name, value in state.items() if name.startswith(_NET)}


def _is_double(value: Tensor) -> bool:
    return value.dtype == torch.float64


def _signals(batch: BatchView, nets: Sequence[BayesianRouter]) -> RouterSignals:
    with torch.no_grad(), recorded_signals(batch.model, nets) as signals, mean_routers(batch.model, nets):
        batch.forward()
    return signals


def _of_examples(of_router: Mapping[int, Sequence[Tensor]], batch: BatchView) -> Tensor | None:
    """The mean over routers, `[B]`; None where the model runs on other rows than one for each example.

    Which rows are those of an example is known to `class_logits` alone, since examples may have different numbers.
    """
    found = [values.to(batch.logits.device) for calls in of_router.values() for values in calls]
    if any(len(values) != len(batch.logits) for values in found):
        return None
    return torch.stack(found).mean(0)
