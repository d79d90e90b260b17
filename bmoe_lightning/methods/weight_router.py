"""What methods share whose routers have other or random weights, from weights that are fine-tuned beside the model."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from bmoe_lightning.methods.batch_view import BatchView
from bmoe_lightning.methods.router_method import on_devices
from bmoe_lightning.methods.router_schedule import RouterTrainingOptions
from bmoe_lightning.methods.router_training import RouterTrainingResult
from bmoe_lightning.methods.trained_router import TrainedRouterMethod
from bmoe_lightning.methods.workbench import Workbench
from bmoe_lightning.routers.base import BayesianRouter, trained_dtype
from bmoe_lightning.routers.costs import RouterCost, weights_cost
from bmoe_lightning.routers.fine_tuned_weights import FineTunedWeights


@dataclass(frozen=True)
class WeightRouterMethod(TrainedRouterMethod):
    """Routers with other or random weights; see `TrainedRouterMethod`."""

    def token_cost(self, d_in: int, num_experts: int, num_samples: int) -> RouterCost:
        return weights_cost(d_in, num_experts, num_samples)

    def fine_tuned(
        self, work: Workbench, options: RouterTrainingOptions, *, chooses_epoch: bool
    ) -> RouterTrainingResult:
        """Fine-tune the weights of the routers; methods with the same options share a training.

        Args:
            work: Workbench of the fit.
            options: Options of the training.
            chooses_epoch: Whether the held-out labels choose the epoch; otherwise it is the last one.
        """
        chosen = self.chosen(work.routers())
        nets = on_devices(
            work.model, [FineTunedWeights(router, dtype=trained_dtype(work.model, router)) for router in chosen]
        )
        key = FineTunedWeights, self.layers, options
        if not chooses_epoch:
            return work.router_passes.train_fully(key, nets, options)
        predict = self.predicted_in_training(nets)
        return work.router_passes.train(key, nets, options, predict, predict_key=self.held_out_key)

    def held_out_losses(
        self, work: Workbench, nets: Sequence[BayesianRouter], *, key: Hashable = None
    ) -> tuple[float, float]:
        """The held-out NLL of the model, and that under some Bayesian routers; a warning says if the latter is higher.

        Args:
            work: Workbench of the fit.
            nets: The routers, on the model's devices.
            key: What the predictions depend on; with an equal one, nothing is predicted again. None if no other method
                has them.
        """
        predicted = self.predicted_in_training(nets)

        def both(view: BatchView) -> Tensor:
            return torch.stack([view.logits.log_softmax(-1), predicted(view)])

        log_probs, labels = work.held_out_log_probs(both, key=key)
        plain, found = (float(F.nll_loss(one, labels)) for one in log_probs)
        if not found <= plain:
            work.warn(
                f"the routers of {self.name} have a higher NLL on the held-out labels than the model itself "
                f"({found:.4f}, {plain:.4f}); lower learning_rate or epochs, or leave the method out"
            )
        return plain, found


def stacked_shifts(results: Sequence[Mapping[str, Tensor]], net: BayesianRouter) -> Tensor:
    """The shifts of a router in several states of `FineTunedWeights`, `[C, N, D]`.

    Args:
        results: The states; see `router_state`.
        net: A Bayesian router beside the router.
    """
    return torch.stack([state[f"{net.router.index}.shift"] for state in results])


def untrained(losses: Sequence[float]) -> RouterTrainingResult:
    """The result of no training, with held-out losses."""
    return RouterTrainingResult({}, 0, tuple(losses), {})
