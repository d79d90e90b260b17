"""The share of half-precision weights that move in the first steps of training, on a sample."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bmoe_lightning.experts.fsdp import local_part
from bmoe_lightning.optim.master_weights import HALF_PRECISION
from bmoe_lightning.utils.distributed import is_rank_zero

_STEPS = 10
_SAMPLES = 256
_TINY = 0.5
_SEED = 0

_watched: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def watch_moved_weights(trainer: L.Trainer) -> Callable[[], None]:
    """Warn if few of the trained half-precision weights change in the first ten steps of an optimizer.

    Of each tensor, 256 entries are compared with those from before the first step; entries whose gradient was zero in
    all of these steps are left out. Nothing is read from the device before the last of them. Optimizers that keep
    small updates, and ones that are watched already, are left alone.

    Args:
        trainer: Trainer that starts to train.

    Returns:
        A function that ends the watch and, if at least one step was seen, says what was found. Idempotent.
    """
    watches = [_Watch(optimizer) for optimizer in trainer.optimizers if _is_to_be_watched(optimizer)]

    def close() -> None:
        for watch in watches:
            watch.close()

    return close


def _is_to_be_watched(optimizer: Optimizer) -> bool:
    # The second is the attribute of torchao's optimizers.
    keeps = ("keeps_small_updates", "bf16_stochastic_round")
    return optimizer not in _watched and not any(getattr(optimizer, name, False) for name in keeps)


@dataclass(frozen=True)
class _Sample:
    """Entries of one parameter, on its device.

    Attributes:
        parameter: The parameter.
        places: Indices of the entries, a tensor for each dimension.
        start: Their values before the first step.
        pushed: Whether a step had a gradient for them, bool.
    """

    parameter: nn.Parameter
    places: tuple[Tensor, ...]
    start: Tensor
    pushed: Tensor

    @torch.no_grad()
    def note_gradient(self) -> None:
        if self.parameter.grad is not None:
            self.pushed.logical_or_(local_part(self.parameter.grad).values[self.places] != 0)

    def counts(self) -> Tensor:
        """Numbers of entries that moved and of those that had a gradient, `[2]` int64 on the CPU without waiting."""
        moved = local_part(self.parameter).values[self.places] != self.start
        return torch.stack([(moved & self.pushed).sum(), self.pushed.sum()])


class _Watch:
    """The watch over the half-precision weights of one optimizer."""

    def __init__(self, optimizer: Optimizer) -> None:
        generator = torch.Generator().manual_seed(_SEED)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        half = [p for p in parameters if p.requires_grad and p.dtype in HALF_PRECISION]
        # A rank may hold nothing of a sharded parameter.
        self._samples = [_sample(p, generator) for p in half if local_part(p).values.numel()]
        self._steps = 0
        self._learning_rate: float | Tensor = 0.0
        self._optimizer = optimizer
        self._hook = None
        if self._samples:
            _watched.add(optimizer)
            self._hook = optimizer.register_step_post_hook(self._after_step)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:  # noqa: ARG002
        self._steps += 1
        self._learning_rate = optimizer.param_groups[0]["lr"]
        for sample in self._samples:
            sample.note_gradient()
        if self._steps == _STEPS:
            self.close()

    def close(self) -> None:
        if self._hook is None:
            return
        self._hook.remove()
        self._hook = None
        _watched.discard(self._optimizer)
        if self._steps:
            self._report(_total([sample.counts() for sample in self._samples]))

    def _report(self, counts: tuple[int, int]) -> None:
        moved, pushed = counts
        if not pushed or moved >= _TINY * pushed or not is_rank_zero():
            return
        dtypes = sorted({str(sample.parameter.dtype).removeprefix("torch.") for sample in self._samples})
        warnings.warn(
            f"only {moved / pushed:.1%} of the trained {' and '.join(dtypes)} weights with a gradient changed in the "
            f"first {self._steps} optimizer steps (learning rate {float(self._learning_rate):.2g}): an update below "
            "half the spacing of a weight's values is lost. Train weights that are in float32 "
            "(Trainer(precision='bf16-mixed')), or use an optimizer that keeps small updates, such as "
            "bmoe_lightning.optim.MasterWeightAdamW (the default of ExpertFinetuner)",
            stacklevel=2,
        )


def _sample(parameter: nn.Parameter, generator: torch.Generator) -> _Sample:
    values = local_part(parameter).values
    positions = torch.randint(values.numel(), (_SAMPLES,), generator=generator)
    # By indices, since a view as one row would copy a transposed weight.
    places = tuple(place.to(values.device) for place in torch.unravel_index(positions, values.shape))
    start = values[places]
    return _Sample(parameter, places, start, torch.zeros_like(start, dtype=torch.bool))


def _total(counts: Sequence[Tensor]) -> tuple[int, int]:
    """The sums of all counts, read from each device once."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for count in counts:
        by_device.setdefault(count.device, []).append(count)
    totals = [torch.stack(parts).sum(0).tolist() for parts in by_device.values()]
    return sum(total[0] for total in totals), sum(total[1] for total in totals)
