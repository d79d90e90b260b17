"""What methods share that train Bayesian routers beside a model that is trained already."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from bmoe_lightning.methods.base import State, option, scalar, state_numbers
from bmoe_lightning.methods.batch_view import BatchView
from bmoe_lightning.methods.needs import Needs
from bmoe_lightning.methods.router_method import (
    RouterMethod,
    SampledRouterMethod,
    check_scores,
    fitted_routers,
    scores_of,
)
from bmoe_lightning.methods.router_training import RouterTrainingOptions, RouterTrainingResult
from bmoe_lightning.methods.workbench import Workbench
from bmoe_lightning.routers.base import (
    BayesianRouter,
    RouterState,
    check_router_weights,
    router_fingerprint,
)
from bmoe_lightning.routers.discovery import find_routers
from bmoe_lightning.routers.prediction import RouterSignals, mean_routers, recorded_signals
from bmoe_lightning.routers.types import Router
from bmoe_lightning.utils.messages import first_names

_NET = "net."
_LARGEST_HELD_OUT_SAMPLES = 8


@dataclass(frozen=True)
class TrainedRouterMethod(RouterMethod):
    """Bayesian routers that `fit` trains on the training data, the model being frozen.

    The held-out labels choose the epoch, among them the one before training. Then the method is untrained noise, which
    a warning says: on data that a model has memorised, the likelihood wants no noise at all.

    Raises:
        ValueError: If a number is out of range; see `RouterMethod`.
    """

    layers: tuple[int | str, ...] = option(
        (), "The routers that are random, by index or name of the router's module; empty for all of them."
    )
    epochs: int = option(10, "Number of passes over the training data.", trial=1)
    learning_rate: float | None = option(
        None,
        "Largest learning rate, of AdamW with warm-up and half a cosine; by default 0.64 / D for a router input of "
        "width D, so that a step moves the logits about as far whatever the width is.",
    )

    source = "https://arxiv.org/abs/2509.23830"

    _fewest_samples = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "layers", tuple(self.layers))
        rate = 1.0 if self.learning_rate is None else self.learning_rate
        if self.epochs < 0 or not rate > 0:
            raise ValueError(
                f"{self.name} needs epochs >= 0 and a positive learning rate, got epochs={self.epochs} and "
                f"learning_rate={self.learning_rate}"
            )

    @property
    def needs(self) -> Needs:
        return Needs(
            calibration_labels=True, advised_labels=25, training_labels=True, routers=True, router_training=True
        )

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

    @property
    def training_options(self) -> RouterTrainingOptions:
        """The options of the training."""
        return RouterTrainingOptions(self.epochs, self.learning_rate)

    def predicted_in_training(self, nets: Sequence[BayesianRouter]) -> Callable[[BatchView], Tensor]:
        """Log-probabilities `[B, K]` of a batch under routers that are trained, of few samples."""
        few = replace(self.sampling, num_samples=min(self.sampling.num_samples, _LARGEST_HELD_OUT_SAMPLES))
        return lambda view: self.predicted(view, nets, few)

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

    def random_routers(self, batch: BatchView, state: State) -> dict[Router, dict[str, Tensor]]:
        """The routers of a model that have a Bayesian router in a state, each with its tensors by name.

        Args:
            batch: View of a batch.
            state: State from `fit`.

        Raises:
            ValueError: If the model has other routers than that of the fit.
        """
        routers = [
            replace(router, top_k=int(top_k) or None)
            for router, top_k in zip(fitted_routers(batch, state["score"]), state["top_k"], strict=True)
        ]
        check_router_weights(batch.model, routers, state["fingerprint"])
        found: dict[Router, dict[str, Tensor]] = {}
        for name, value in state.items():
            if name.startswith(_NET):
                index, _, own = name.removeprefix(_NET).partition(".")
                found.setdefault(routers[int(index)], {})[own] = value
        return found

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
        for key, shape in (("top_k", (count,)), ("fingerprint", (32,)), ("epoch", ())):
            if key not in state or state[key].shape != shape:
                raise ValueError(f"{key!r} must have the shape {list(shape)}")

    def hyperparameters(self, state: State) -> dict[str, float]:
        numbers = {name: state[name] for name in ("epoch", "kl", "scale_ratio", "gate_temperature") if name in state}
        losses = state["held_out_nll"].tolist()
        held_out = {"held_out_nll_untrained": losses[0], "held_out_nll": min(losses)} if losses else {}
        return {
            "num_samples": self.sampling.num_samples,
            **held_out,
            **state_numbers({name: value.mean() for name, value in numbers.items()}),
        }


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
