"""The share of the trained weights' gradient that a posterior covers.

A posterior over some of the trained weights has too small a variance by a factor `kappa`, the inverse of

    share = E ||d(z . f) / dw_covered||^2 / E ||d(z . f) / dw_trained||^2,

the expectation over examples and over Gaussian z of mean zero over an example's classes, to which a softmax is
invariant. Both expectations are estimated from the same backward passes: one z for each example of a batch, which is
unbiased for their sum, since the z of different examples are independent.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from bmoe_lightning.experts import ClassLogits
from bmoe_lightning.experts.fsdp import is_sharded
from bmoe_lightning.experts.tapped_batches import TappedBatch, tapped_batch
from bmoe_lightning.experts.types import ExpertLayer
from bmoe_lightning.experts.weight_gradients import squared_gradients
from bmoe_lightning.experts.weights import down_proj_parameters
from bmoe_lightning.utils.distributed import gather_number, num_processes, process_rank, sum_over_processes
from bmoe_lightning.utils.memory import is_out_of_memory
from bmoe_lightning.utils.random_state import forked_random_state

MAX_PASSES = 40
"""Maximum number of backward passes to the weights, over all ranks."""

_NO_MEMORY = "there is not enough memory for gradients of the trained weights"
_FIRST_BATCHES = 4  # so that small data sets have a standard error
_COST = 0.07  # of the curvature pass, for the batches after the first
_PASS_COST = 3  # a forward pass, or a backward pass to the activations, costs 1, and one to the weights 2


@dataclass(frozen=True)
class GradientShare:
    """The share of the trained weights' squared gradient that a posterior covers.

    Attributes:
        share: The share, between 0 and 1; None if it is unknown.
        standard_error: Its standard error; None if there are fewer than two passes, and 0 if the share is exact.
        num_passes: Number of backward passes; 0 if the share is exact, or unknown.
        reason: Why it is unknown; empty if it is known.
        num_trained: Number of weights that count as trained; None in files of an earlier version.
        is_assumed: Whether these are all that require gradients, since it was not known which were trained.
    """

    share: float | None
    standard_error: float | None = None
    num_passes: int = 0
    reason: str = ""
    num_trained: int | None = None
    is_assumed: bool = False

    @property
    def kappa(self) -> float | None:
        """The inverse of the share, infinite if nothing is covered; None if it is unknown."""
        if self.share is None:
            return None
        return 1 / self.share if self.share > 0 else math.inf

    @property
    def kappa_error(self) -> float | None:
        """The standard error of `kappa`, to first order; None if it is unknown."""
        if not self.share or self.standard_error is None:
            return None
        return self.standard_error / self.share**2


def share_of_squares(squares: Tensor) -> GradientShare:
    """The share from squared gradients, with the standard error of a ratio of means.

    Args:
        squares: Squared gradients `[passes, 2]` float64, of all trained weights and of the covered ones.
    """
    if not bool(squares.isfinite().all()):
        return GradientShare(None, reason="a gradient is not finite")
    trained, covered = squares.sum(0).tolist()
    if not trained:
        return GradientShare(None, reason="no weight that was trained affects a logit")
    share, count = min(covered / trained, 1.0), len(squares)
    residuals = float((squares[:, 1] - share * squares[:, 0]).square().sum())
    error = math.sqrt(residuals * count / (count - 1)) / trained if count > 1 else None
    return GradientShare(share, error, count)


@dataclass(frozen=True)
class GradientShares:
    """The shares of any choice of the layers of a curvature pass.

    Attributes:
        squares: Squared gradients `[passes, 1 + L]` float64, of all trained weights and of those of each layer.
        layers: Names of the layers.
        untrained: Names of the layers none of whose weights was trained.
        is_all: Whether no weight was trained but those of `layers`, and all of these.
        reason: Why no share is known; empty if they are.
        num_trained: Number of weights that count as trained.
        is_assumed: Whether these are all that require gradients, since it was not known which were trained.
    """

    squares: Tensor
    layers: tuple[str, ...]
    untrained: frozenset[str] = frozenset()
    is_all: bool = False
    reason: str = ""
    num_trained: int | None = None
    is_assumed: bool = False

    def known(self, names: Collection[str]) -> GradientShare | None:
        """The share of some layers if it follows without a pass.

        Args:
            names: Names of the layers.
        """
        if self.is_all and set(self.layers) <= set(names):
            return self._of_trained(GradientShare(1.0, 0.0))
        if self.layers and self.untrained >= set(names):
            return self._of_trained(GradientShare(0.0, 0.0))
        return self._of_trained(GradientShare(None, reason=self.reason)) if self.reason else None

    def of(self, names: Collection[str]) -> GradientShare:
        """The share of some layers; see `known` for the argument."""
        if (known := self.known(names)) is not None:
            return known
        chosen = [1 + position for position, name in enumerate(self.layers) if name in names]
        squares = torch.stack([self.squares[:, 0], self.squares[:, chosen].sum(1)], dim=1)
        return self._of_trained(share_of_squares(squares))

    def _of_trained(self, share: GradientShare) -> GradientShare:
        return replace(share, num_trained=self.num_trained, is_assumed=self.is_assumed)


class GradientShareRecorder:
    """Records the squared gradients of trained weights during a curvature pass, on some of its batches.

    One forward and backward pass for each of the first four batches, and then for every n-th one, n such that these
    cost at most 7 % of the curvature pass; at most `MAX_PASSES` in all. A second pass on the same batch would tell
    less. The first four cost as much as 12 forward passes, which is a large part of a pass over few batches: half of
    one over 8 batches with two backward passes each, and a tenth of one over 40.

    Args:
        model: The model.
        layers: The layers of the curvature.
        choices: Names of the layers of each posterior; by default one posterior, over all layers. Where all their
            shares follow without a pass, there is none.
        trained: The parameters that were trained, of which those that require gradients count; by default all those.
        seed: Seed of z.
        distributed: Whether this is one of all ranks of torch.distributed's default group.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[ExpertLayer],
        *,
        choices: Sequence[Collection[str]] | None = None,
        trained: Iterable[nn.Parameter] | None = None,
        seed: int = 0,
        distributed: bool = False,
    ) -> None:
        of_layer = {id(p): at for at, layer in enumerate(layers) for p in down_proj_parameters(model, layer).values()}
        chosen = {id(parameter) for parameter in (model.parameters() if trained is None else trained)}
        self._trained = [p for p in model.parameters() if p.requires_grad and id(p) in chosen]
        found = {id(parameter) for parameter in self._trained}
        # Column 0 is that of the weights of no layer.
        self._columns = torch.tensor([1 + of_layer.get(id(p), -1) for p in self._trained], dtype=torch.int64)
        names = tuple(layer.name for layer in layers)
        trained_layers = {names[at] for key, at in of_layer.items() if key in found}
        self._result = GradientShares(
            torch.zeros(0, 1 + len(layers), dtype=torch.float64),
            names,
            frozenset(names) - trained_layers if found else frozenset(),
            bool(found) and found == of_layer.keys(),
            self._obstacle(),
            sum(parameter.numel() for parameter in self._trained),
            trained is None,
        )
        self._choices = [names] if choices is None else list(choices)
        self._seed = seed
        self._distributed = distributed
        self._rank, ranks = (process_rank(), num_processes()) if distributed else (0, 1)
        self._most = max(1, MAX_PASSES // ranks)
        self._batches = 0
        self._spacing = 1

    @classmethod
    def unused(cls) -> Self:
        """A recorder that wants no batch."""
        return cls(nn.Module(), ())

    def _obstacle(self) -> str:
        if not self._trained:
            return "no weight requires gradients"
        if any(is_sharded(parameter) for parameter in self._trained):
            return "the weights are sharded over ranks"
        return "weights are offloaded" if any(parameter.is_meta for parameter in self._trained) else ""

    @property
    def _is_unused(self) -> bool:
        return all(self._result.known(names) is not None for names in self._choices)

    @property
    def wants_next(self) -> bool:
        """Whether the squared gradients of the next batch are taken."""
        is_in_turn = self._batches < _FIRST_BATCHES or self._batches % self._spacing == 0
        return is_in_turn and len(self._result.squares) < self._most and not self._is_unused

    def add(
        self, model: nn.Module, layers: Sequence[ExpertLayer], class_logits: ClassLogits, batch: Any, num_passes: int
    ) -> None:
        """Count a batch, and take its squared gradients, if it is wanted.

        The batch runs again, with a graph to the trained weights that is freed before this returns, so that a lack of
        memory for it affects nothing else. torch's random state is left alone.

        Args:
            model: The model.
            layers: The layers of the curvature.
            class_logits: Function `(model, batch) -> (logits [B, K], labels [B] or None)`.
            batch: Batch as `class_logits` takes it, or a `CountedBatch`.
            num_passes: Number of backward passes that the curvature takes on it.
        """
        wanted, position = self.wants_next, self._batches
        self._batches += 1
        if position == 0:
            self._spacing = math.ceil(_PASS_COST / (_COST * (1 + max(num_passes, 1))))
        if not wanted:
            return
        seed = self._seed + 7_368_787 * self._rank + 1_000_003 * position
        try:
            with forked_random_state(), tapped_batch(model, layers, class_logits, batch, frozen=False) as tapped:
                if tapped.taps.scale is not None:
                    self._give_up("the backward pass runs in float16, in which gradients underflow")
                    return
                squares = squared_gradients(tapped.logits, random_contrasts(tapped, seed=seed), self._trained)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._give_up(_NO_MEMORY)
            return
        row = squares.new_zeros(self._result.squares.shape[1]).index_add_(0, self._columns, squares)
        row[0] = squares.sum()
        self._result = replace(self._result, squares=torch.cat([self._result.squares, row.unsqueeze(0)]))

    def _give_up(self, reason: str) -> None:
        self._result = replace(self._result, reason=reason)

    def state(self) -> dict[str, Tensor]:
        """All tensors needed to resume, by name; none if nothing is recorded."""
        if self._is_unused:
            return {}
        return {"squares": self._result.squares, "progress": torch.tensor([self._batches, self._spacing])}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore a `state`; raises `ValueError` if it does not fit. Without one the record begins here."""
        if not state or self._is_unused:
            return
        squares, progress = state.get("squares"), state.get("progress")
        width = self._result.squares.shape[1]
        valid = squares is not None and squares.dtype == torch.float64 and squares.shape[1:] == (width,)
        valid = valid and progress is not None and progress.dtype == torch.int64 and progress.shape == (2,)
        if squares is None or progress is None or not valid or not bool((progress >= torch.tensor([0, 1])).all()):
            raise ValueError("the squared gradients of trained weights have other shapes or dtypes")
        self._result = replace(self._result, squares=squares.clone())
        self._batches, self._spacing = progress.tolist()

    def finish(self) -> GradientShares:
        """The squared gradients of all ranks. A collective, if distributed."""
        if not self._distributed:
            return self._result
        counts = gather_number(len(self._result.squares))
        anywhere = max(gather_number(int(bool(self._result.reason))))
        rows = torch.zeros(sum(counts), self._result.squares.shape[1], dtype=torch.float64)
        begin = sum(counts[: self._rank])
        rows[begin : begin + counts[self._rank]] = self._result.squares
        sum_over_processes([rows])
        reason = self._result.reason or ("it cannot be estimated on another rank" if anywhere else "")
        return replace(self._result, squares=rows, reason=reason)


def random_contrasts(tapped: TappedBatch, *, seed: int) -> Tensor:
    """Standard normal z `[B, K]` of mean zero over the classes of each example; 0 for examples that do not count.

    Args:
        tapped: The batch.
        seed: Seed; the noise is drawn on the CPU, so that it is the same on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    present = tapped.present.cpu()
    noise = torch.randn(present.shape, generator=generator, dtype=torch.float64) * present
    mean = noise.sum(1, keepdim=True) / present.sum(1, keepdim=True).clamp(min=1)
    counted = tapped.counts(present.device).unsqueeze(1)
    return ((noise - mean) * present * counted).to(tapped.logits.device)
