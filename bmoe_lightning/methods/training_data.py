"""The training data of curvature passes, and the location of the checkpoints of these passes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from bmoe_lightning.curvature.spec import Curvature
from bmoe_lightning.utils.random_state import reproducible_order


@runtime_checkable
class TrainingData(Protocol):
    """The training data of the passes of a fit."""

    def batches(self, max_batches: int | None, description: str = "Curvature", *, order: int = 0) -> Iterable[Any]:
        """Batches of one pass; on each rank at most `max_batches` of its shard.

        Args:
            max_batches: Maximum number of batches; None for all.
            description: Text beside the progress bar.
            order: Number of the order of the data, the same on all ranks. Batches in a sequence are permuted, and
                loaders shuffle with this number as seed; what has no random order keeps its own.
        """
        ...

    def num_examples(self, max_batches: int | None, seen: int) -> int:
        """Number of examples that the curvature is scaled to, given the number seen in the pass of all ranks."""
        ...


@dataclass(frozen=True)
class Batches:
    """Training data from any iterable of batches, which is iterated over once per curvature.

    Attributes:
        iterable: The batches.
        size: Number of examples that the curvature is scaled to, if the batches are a subset of the data.
    """

    iterable: Iterable[Any]
    size: int | None = None

    def batches(self, max_batches: int | None, description: str = "Curvature", *, order: int = 0) -> Iterable[Any]:
        """The batches, at most `max_batches` of them; a sequence is permuted in other orders than 0."""
        batches = self.iterable
        if order and isinstance(batches, Sequence):
            generator = torch.Generator().manual_seed(order)
            batches = [batches[index] for index in torch.randperm(len(batches), generator=generator).tolist()]
        elif order:
            batches = _Ordered(batches, order)
        return batches if max_batches is None else islice(batches, max_batches)

    def num_examples(self, max_batches: int | None, seen: int) -> int:
        """The given size, or the number seen."""
        return seen if self.size is None else self.size

    @property
    def iterates_once(self) -> bool:
        """Whether the batches can be iterated over only once."""
        return isinstance(self.iterable, Iterator)


@dataclass(frozen=True)
class _Ordered:
    """An iterable of batches, such as a DataLoader, in another order than its first."""

    batches: Iterable[Any]
    order: int

    def __iter__(self) -> Iterator[Any]:
        with reproducible_order(self.batches, order=self.order):
            yield from self.batches


@dataclass(frozen=True)
class PassFiles:
    """Location of the checkpoints of curvature passes.

    Attributes:
        folder: Folder of the checkpoints.
        every: Number of batches between two checkpoints.
        fit_id: Id of the fit that the passes belong to, so that two fits can share a folder.
    """

    folder: Path
    every: int
    fit_id: str = ""

    def path(self, curvature: Curvature) -> Path:
        """Path of the checkpoint of one curvature."""
        return self.folder / f"{self.stem}{curvature.digest}.safetensors"

    @property
    def stem(self) -> str:
        """What the file names of all curvatures begin with."""
        return f"curvature_state-{self.fit_id[:8]}-" if self.fit_id else "curvature_state-"
