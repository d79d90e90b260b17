"""Bayesian routers in the steps of a Lightning trainer."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal, get_args

import lightning as L
import torch
from torch import Tensor, nn

from bmoe_lightning.methods.base import check_choice
from bmoe_lightning.routers.attached import BayesianRouters, median_gaps
from bmoe_lightning.routers.training import RouterTraining, trained_routers
from bmoe_lightning.utils.distributed import failing_together, is_rank_zero, sum_over_processes

PriorUnit = Literal["gap", "one"]

_logger = logging.getLogger(__name__)

_KEPT = 50  # steps between two reads of the device


@dataclass(frozen=True)
class RouterPrior:
    """The prior of Gaussian routers, and how much its divergence counts.

    Attributes:
        scale: Standard deviation of each logit, in units.
        unit: `gap`, the median gap between the K-th and the next largest logit of each router, or `one`.
        beta: What multiplies the penalty.

    Raises:
        ValueError: If a number is out of range, or the unit is unknown.
    """

    scale: float = 2.0
    unit: PriorUnit = "gap"
    beta: float = 0.1

    def __post_init__(self) -> None:
        check_choice("prior_unit", self.unit, get_args(PriorUnit))
        if not 0 < self.scale < float("inf"):
            raise ValueError(f"prior_scale must be a positive number, got {self.scale}")
        if not 0 <= self.beta < float("inf"):
            raise ValueError(f"beta must be a number of at least 0, got {self.beta}")


class RouterSteps:
    """The Bayesian routers of one run of a trainer, in its training steps.

    Before the first step the routers are probed, and their priors scaled, on its batch. Between steps the model is
    itself. What the routers report is collected on their devices, and read every now and then.

    Args:
        model: The model.
        routers: The Bayesian routers beside it.
        prior: Their prior.
        seed: Seed of the samples, not negative.

    Raises:
        ValueError: If the routers have another prior, from an earlier training.
    """

    def __init__(self, model: nn.Module, routers: BayesianRouters, prior: RouterPrior, seed: int) -> None:
        if routers.prior not in (None, (prior.scale, prior.unit)):
            raise ValueError(
                f"the Bayesian routers were trained with (prior_scale, prior_unit) = {routers.prior}, and these "
                f"arguments are {(prior.scale, prior.unit)} now; pass those of the training, or train new routers"
            )
        self._model, self._routers, self._prior, self._seed = model, routers, prior, seed
        self._open = ExitStack()
        self._training: RouterTraining | None = None
        self._alarms = {net.router.index: alarm for net in routers.nets if (alarm := net.collapse_alarm()) is not None}
        self._warned: set[int] = set()
        self._keys: list[tuple[str, int]] = []
        self._kept: list[Tensor] = []
        self._sums: dict[tuple[str, int], list[float]] = {}

    def prepare(self, trainer: L.Trainer, run: Callable[[], Tensor]) -> None:
        """Probe the routers, scale their priors, and put them into the model. A collective; only once.

        Args:
            trainer: The trainer.
            run: Runs the model on the first batch.

        Raises:
            ValueError: If a router is not supported, or half of its gaps are zero.
        """
        if self._training is None:
            self._scale(trainer, run)
            seed = self._seed * trainer.world_size + trainer.global_rank
            self._training = self._open.enter_context(trained_routers(self._model, self._routers.nets, seed=seed))

    def begin(self, step: int, *, penalty_weight: float = 0.0) -> RouterTraining:
        """Begin a step.

        Args:
            step: Number of the batch, another one for each.
            penalty_weight: What multiplies the penalty in the backward pass; see `RouterTraining.begin`.

        Raises:
            RuntimeError: If nothing was prepared.
        """
        if self._training is None:
            raise RuntimeError("no training batch has started, so the routers are not prepared; call trainer.fit")
        self._training.begin(step, penalty_weight=penalty_weight)
        return self._training

    def end(self) -> None:
        """End a step, after its backward pass."""
        if self._training is None:
            return
        means = self._training.statistic_means()
        self._training.end()
        found = {(name, index): mean for name, of_router in means.items() for index, mean in of_router.items()}
        if not found:
            return
        if list(found) != self._keys:
            self._read()
            self._keys = list(found)
        device = next(iter(found.values())).device
        self._kept.append(torch.stack([mean.to(device) for mean in found.values()]))
        if len(self._kept) >= _KEPT:
            self._read()

    def epoch_means(self) -> dict[str, float]:
        """Means over the steps and the routers since the last call, by name; none if there were no steps."""
        self._read()
        by_name: dict[str, list[float]] = {}
        for (name, _), values in self._sums.items():
            by_name.setdefault(name, []).append(sum(values) / len(values))
        self._sums = {}
        return {name: sum(values) / len(values) for name, values in by_name.items()}

    def close(self) -> None:
        """Take the routers out of the model. Idempotent."""
        self._training = None
        self._open.close()

    def _scale(self, trainer: L.Trainer, run: Callable[[], Tensor]) -> None:
        several = trainer.world_size > 1
        counts = torch.zeros(0)
        with failing_together(distributed=several):
            self._routers.probe(self._model, run)
            if self._routers.lacks_scale:
                counts = self._routers.gap_counts(self._model, run)
        if not self._routers.lacks_scale:
            return
        if several:
            sum_over_processes([counts])
        gaps = median_gaps(counts)
        units = gaps if self._prior.unit == "gap" else [1.0] * len(gaps)
        self._routers.set_scales([self._prior.scale * unit for unit in units])
        self._routers.prior = (self._prior.scale, self._prior.unit)
        if is_rank_zero():
            _tell(self._routers, gaps)

    def _read(self) -> None:
        """Read what was kept, and warn of noise that has collapsed."""
        if not self._kept:
            return
        rows: Sequence[Sequence[float]] = torch.stack(self._kept).tolist()
        self._kept = []
        says: dict[int, str] = {}
        for row in rows:
            of_router: dict[int, dict[str, float]] = {}
            for (name, index), value in zip(self._keys, row, strict=True):
                self._sums.setdefault((name, index), []).append(value)
                of_router.setdefault(index, {})[name] = value
            for index, alarm in self._alarms.items():
                sentence = alarm(of_router[index]) if index in of_router else None
                if sentence is not None and index not in self._warned:
                    says[index] = sentence
        self._warned |= set(says)
        if says and is_rank_zero():
            index, sentence = next(iter(says.items()))
            name = next(net.router.name for net in self._routers.nets if net.router.index == index)
            warnings.warn(
                f"the noise of {len(says)} of {len(self._routers)} Bayesian routers has collapsed, in 100 steps in a "
                f"row: {name!r} {sentence}. Lower their learning rate, or change beta",
                stacklevel=2,
            )


def _tell(routers: BayesianRouters, gaps: Sequence[float]) -> None:
    scales = {net.router.index: net.hyperparameters().get("prior_scale") for net in routers.nets}
    parts = (
        f"{net.router.index}: {scales[net.router.index]:.3g} (gap {gap:.3g})"
        for net, gap in zip(routers.nets, gaps, strict=True)
    )
    _logger.info("prior scale of the noise of router logits, by router: %s", ", ".join(parts))
