"""Train Bayesian routers beside a model that is trained already: passes over its training data, all else frozen.

The loss is the cross entropy of the class logits, of answers alone, plus `beta` times the penalty of the routers (see
`bmoe_lightning.routers.training`). The model runs in evaluation mode. On data that the model has memorised the
likelihood wants no noise, so that training can be worse than none: the held-out labels choose the epoch, among them the
one before training, which is untrained noise.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bmoe_lightning.experts import ClassLogits
from bmoe_lightning.experts.counted_batch import count_of, lockstep, plain_batch
from bmoe_lightning.experts.fsdp import runs_in_lockstep
from bmoe_lightning.experts.gradient_checkpointing import recomputed_activations
from bmoe_lightning.experts.logits_contract import checked_labels, masked_logits, run_class_logits
from bmoe_lightning.experts.model_state import evaluation_mode, frozen_parameters
from bmoe_lightning.experts.sharded_calls import BackwardPasses
from bmoe_lightning.experts.threads import model_lock
from bmoe_lightning.experts.wrappers.compiled import is_compiled
from bmoe_lightning.methods.batch_view import BatchView
from bmoe_lightning.methods.data_differences import iterates_once
from bmoe_lightning.methods.router_schedule import RouterTrainingOptions, collecting_steps, rate_share, router_optimizer
from bmoe_lightning.methods.training_data import TrainingData
from bmoe_lightning.routers.base import BayesianRouter, router_state
from bmoe_lightning.routers.training import RouterTraining, trained_routers
from bmoe_lightning.utils.distributed import (
    failing_together,
    gather_number,
    is_rank_zero,
    num_processes,
    process_rank,
    sum_over_processes,
)
from bmoe_lightning.utils.fit_warnings import collected_fit_warnings, warn_of_fit
from bmoe_lightning.utils.random_state import unchanged_random_state

_logger = logging.getLogger(__name__)

_NONE = object()
# Between the first steps of two runs, which have other random numbers.
_STEPS_OF_RUN = 1 << 40
_BASELINE_DECAY = 0.9


@dataclass(frozen=True)
class RouterTrainingResult:
    """The trained routers; the nets have the same values.

    Attributes:
        state: State of the epoch with the least held-out loss, or of the last one; see `router_state`.
        epoch: Number of epochs of training that it had.
        losses: Held-out loss before training and after each epoch; none where it chose no epoch.
        statistics: Means over that epoch, by name: one number for each router. None before training.
        collected: States that were collected along the run.
    """

    state: dict[str, Tensor]
    epoch: int
    losses: tuple[float, ...]
    statistics: Mapping[str, tuple[float, ...]]
    collected: tuple[dict[str, Tensor], ...] = ()


@dataclass(frozen=True)
class _Epoch:
    """The routers after an epoch, and the means of the statistics of its steps, by name."""

    state: dict[str, Tensor]
    statistics: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class _Trained:
    """A training: the routers before it and after each epoch, states that were collected, and warnings."""

    epochs: Sequence[_Epoch]
    collected: Sequence[dict[str, Tensor]]
    doubts: tuple[str, ...]

    def result(self, nets: Sequence[BayesianRouter], epoch: int, losses: Sequence[float]) -> RouterTrainingResult:
        """The routers of an epoch, to which nets are set."""
        found = self.epochs[epoch]
        _set(nets, found.state)
        return RouterTrainingResult(found.state, epoch, tuple(losses), found.statistics, tuple(self.collected))


class RouterPasses:
    """Passes over the training data that train routers. Each is a collective, if distributed.

    Args:
        model: The model.
        class_logits: Function `(model, batch) -> (logits [B, K], labels [B])`.
        training: The training data.
        held_out_log_probs: `Workbench.held_out_log_probs`.
        seed: Seed of the samples.
        distributed: Whether all ranks of torch.distributed's default group take part, each with its shard of the data.
    """

    def __init__(
        self,
        model: nn.Module,
        class_logits: ClassLogits,
        training: TrainingData,
        held_out_log_probs: Callable[..., tuple[Tensor, Tensor]],
        *,
        seed: int,
        distributed: bool,
    ) -> None:
        self._model = model
        self._class_logits = class_logits
        self._training = training
        self._held_out_log_probs = held_out_log_probs
        self._seed = seed
        self._distributed = distributed
        self._trained: dict[Hashable, _Trained] = {}

    def train(
        self,
        key: Hashable,
        nets: Sequence[BayesianRouter],
        options: RouterTrainingOptions,
        predict: Callable[[BatchView], Tensor],
        *,
        predict_key: Hashable = None,
    ) -> RouterTrainingResult:
        """Train routers, and set them to the epoch with the least held-out loss.

        Args:
            key: What the training depends on: routers that were trained with the same key before are not trained again.
            nets: The routers, on the devices of their routers.
            options: Options of the training.
            predict: Function from the view of a batch to log-probabilities `[B, K]` under the routers as they are.
            predict_key: What these depend on besides the routers; with an equal one, an epoch is not predicted again.
                None if no other method predicts it.

        Raises:
            ValueError: If the training data can be iterated over only once, are empty or have no labels.
        """
        trained = self._training_of(key, nets, options)
        losses: list[float] = []
        for epoch, found in enumerate(trained.epochs):
            _set(nets, found.state)
            one = None if predict_key is None else (key, predict_key, epoch)
            log_probs, labels = self._held_out_log_probs(lambda view: predict(view).unsqueeze(0), key=one)
            losses.append(float(F.nll_loss(log_probs[0], labels)))
            if is_rank_zero():
                _logger.info("%s", _line(epoch, options.epochs, losses, found.statistics))
        best = min(range(len(losses)), key=lambda epoch: losses[epoch])
        return trained.result(nets, best, losses)

    def train_fully(
        self, key: Hashable, nets: Sequence[BayesianRouter], options: RouterTrainingOptions
    ) -> RouterTrainingResult:
        """Train routers, and set them to the last epoch; arguments and errors as of `train`."""
        trained = self._training_of(key, nets, options)
        return trained.result(nets, len(trained.epochs) - 1, ())

    def _training_of(self, key: Hashable, nets: Sequence[BayesianRouter], options: RouterTrainingOptions) -> _Trained:
        if key not in self._trained:
            with collected_fit_warnings() as doubts:
                epochs, collected = self._epochs(nets, options)
            self._trained[key] = _Trained(epochs, collected, tuple(doubts))
        for sentence in self._trained[key].doubts:
            warn_of_fit(sentence)
        return self._trained[key]

    def _epochs(
        self, nets: Sequence[BayesianRouter], options: RouterTrainingOptions
    ) -> tuple[list[_Epoch], list[dict[str, Tensor]]]:
        """Train routers; returns their state before training and after each epoch, and the collected states."""
        found = [_Epoch(router_state(nets), {})]
        if not nets or not options.epochs:
            return found, []
        if iterates_once(self._training):
            raise ValueError(
                "a method takes several passes over the training data, which can be iterated over only once; pass a "
                "list of batches or a loader"
            )
        num_steps = options.epochs * self._num_batches()
        run = _Run(self._model, self._class_logits, nets, options, self._rank_seed, self._distributed, num_steps)
        optimizer = router_optimizer(nets, options)
        rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_share(step, num_steps, options))
        for _ in range(options.epochs):
            statistics = run.epoch(self._training.batches(None, "Routers", order=options.run), optimizer, rate)
            found.append(_Epoch(router_state(nets), statistics))
        return found, run.collected

    @property
    def _rank_seed(self) -> int:
        """Another seed on each rank, whose examples get numbers of their own."""
        return self._seed * num_processes() + process_rank() if self._distributed else self._seed

    def _num_batches(self) -> int:
        batches: Any = self._training.batches(None, "Routers")
        with unchanged_random_state(batches), failing_together(distributed=self._distributed):
            count = len(batches) if hasattr(batches, "__len__") else sum(1 for _ in batches)
        counts = gather_number(count) if self._distributed else [count]
        if not any(counts):
            raise ValueError("the training data are empty, so routers cannot be trained; pass at least one batch")
        return max(counts)


class _Run:
    """The steps of one training, numbered over all epochs.

    Attributes:
        collected: States that were collected.
    """

    def __init__(
        self,
        model: nn.Module,
        class_logits: ClassLogits,
        nets: Sequence[BayesianRouter],
        options: RouterTrainingOptions,
        seed: int,
        distributed: bool,
        num_steps: int,
    ) -> None:
        self._model, self._class_logits, self._nets, self._options = model, class_logits, nets, options
        self._seed, self._distributed = seed, distributed
        self._collects = collecting_steps(options.collections, num_steps)
        self.collected: list[dict[str, Tensor]] = []
        self._parameters = [p for net in nets for p in net.parameters() if p.requires_grad]
        self._step = 0
        self._baseline: float | None = None
        self._alarms = {net.router.index: alarm for net in nets if (alarm := net.collapse_alarm()) is not None}

    def epoch(
        self, batches: Iterable[Any], optimizer: torch.optim.Optimizer, rate: torch.optim.lr_scheduler.LambdaLR
    ) -> dict[str, tuple[float, ...]]:
        """One pass over the data; returns the means of the statistics of its steps."""
        sums: dict[str, dict[int, list[float]]] = {}
        with ExitStack() as stack:
            stack.enter_context(unchanged_random_state(batches))
            stack.enter_context(failing_together(distributed=self._distributed))
            for batch in self._batches(batches):
                for parameter, gradient in zip(self._parameters, self._gradients(batch, sums), strict=True):
                    parameter.grad = gradient
                optimizer.step()
                rate.step()
                self._step += 1
                if self._step in self._collects:
                    self.collected.append(router_state(self._nets))
            optimizer.zero_grad()
        return {
            name: tuple(sum(values) / len(values) for _, values in sorted(of_router.items()))
            for name, of_router in sums.items()
        }

    def _batches(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Batches, or None where another rank has one and this one has none left."""
        if not self._distributed or runs_in_lockstep(self._model):
            yield from lockstep(self._model, batches)
            return
        iterator = iter(batches)
        while True:
            batch = next(iterator, _NONE)
            if not any(gather_number(int(batch is not _NONE))):
                return
            yield batch

    def _gradients(self, batch: Any, sums: dict[str, dict[int, list[float]]]) -> list[Tensor]:
        """The gradients of one step, those of all ranks together."""
        sharded = runs_in_lockstep(self._model)
        with ExitStack() as stack:
            stack.enter_context(model_lock(self._model))
            stack.enter_context(evaluation_mode(self._model))
            stack.enter_context(frozen_parameters(self._model))
            stack.enter_context(recomputed_activations(self._model))
            training = stack.enter_context(
                trained_routers(self._model, self._nets, seed=self._seed, everywhere=not is_compiled(self._model))
            )
            training.begin(_STEPS_OF_RUN * self._options.run + self._step)
            passes = BackwardPasses()
            losses = self._parameters[0].new_zeros(0)
            if batch is not _NONE:
                with passes.through(self._model) if sharded else nullcontext(), torch.enable_grad():
                    losses = self._losses(batch)
            total, tokens = len(losses), None
            if self._distributed:
                total = sum(gather_number(len(losses)))
                tokens = self._num_tokens(training)
            flat = torch.zeros(sum(p.numel() for p in self._parameters), dtype=torch.float64)
            if batch is not _NONE:
                with torch.enable_grad(), passes.together(0) if sharded else nullcontext():
                    objective = self._objective(training, losses, total, tokens)
                    found = torch.autograd.grad(objective, self._parameters, allow_unused=True)
                filled = (
                    torch.zeros_like(parameter) if gradient is None else gradient
                    for parameter, gradient in zip(self._parameters, found, strict=True)
                )
                flat = torch.cat([gradient.detach().double().flatten().cpu() for gradient in filled])
                self._observe(training, sums)
        if self._distributed:
            gather_number(0)
            sum_over_processes([flat])
        parts = flat.split([parameter.numel() for parameter in self._parameters])
        return [part.view_as(p).to(p) for part, p in zip(parts, self._parameters, strict=True)]

    def _losses(self, batch: Any) -> Tensor:
        """The cross entropy of each example that is counted, with graph."""
        logits, labels = run_class_logits(self._class_logits, self._model, plain_batch(batch))
        if labels is None:
            raise ValueError(
                "routers are trained on the labels of the training data, and class_logits returned None for them; "
                "return (logits, labels)"
            )
        logits = masked_logits(logits)
        checked = checked_labels(labels, logits).to(logits.device)
        return F.cross_entropy(logits, checked, reduction="none")[: count_of(batch, len(logits))]

    def _num_tokens(self, training: RouterTraining) -> dict[int, int]:
        """Numbers of real tokens of all ranks, by the index of the router. A collective."""
        own = training.num_tokens()
        counts = torch.tensor([own[net.router.index] for net in training.nets])
        sum_over_processes([counts])
        return {net.router.index: int(count) for net, count in zip(training.nets, counts, strict=True)}

    def _objective(
        self, training: RouterTraining, losses: Tensor, total: int, tokens: Mapping[int, int] | None
    ) -> Tensor:
        objective = losses.sum() / max(total, 1) + self._options.beta * training.penalty(tokens)
        probabilities = training.log_probability() if self._options.score_function else None
        if probabilities is not None and len(losses):
            value = losses.detach()
            if self._baseline is not None:
                gain = value - self._baseline
                if len(probabilities) == len(value):
                    objective = objective + (gain * probabilities).sum() / max(total, 1)
                else:
                    objective = objective + gain.mean() * probabilities.sum() * len(value) / max(total, 1)
            mean = float(value.mean())
            before = mean if self._baseline is None else self._baseline
            self._baseline = _BASELINE_DECAY * before + (1 - _BASELINE_DECAY) * mean
        return objective

    def _observe(self, training: RouterTraining, sums: dict[str, dict[int, list[float]]]) -> None:
        statistics = training.statistics()
        for name, of_router in statistics.items():
            for index, value in of_router.items():
                sums.setdefault(name, {}).setdefault(index, []).append(value)
        for index, alarm in list(self._alarms.items()):
            numbers = {name: values[index] for name, values in statistics.items() if index in values}
            if numbers and (sentence := alarm(numbers)) is not None:
                del self._alarms[index]  # said once
                warn_of_fit(
                    f"the noise of router {index} has collapsed: in 100 steps in a row it {sentence}; lower the "
                    "learning rate, or change beta"
                )


def _set(nets: Sequence[BayesianRouter], state: Mapping[str, Tensor]) -> None:
    """Copy a state into routers, wherever they are."""
    for net in nets:
        net.load_state_dict({name: state[f"{net.router.index}.{name}"] for name in net.state_dict()})


def _line(epoch: int, epochs: int, losses: Sequence[float], statistics: Mapping[str, Sequence[float]]) -> str:
    means = [f"{name} {sum(values) / len(values):.4g}" for name, values in statistics.items()]
    return f"routers, epoch {epoch}/{epochs}: " + ", ".join([*means, f"held-out NLL {losses[-1]:.4f}"])
