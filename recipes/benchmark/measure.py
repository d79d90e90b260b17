"""Timings within a pass, peak memory, and statistics of timings; see `recipes.common.timing`."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from recipes.common.peak_memory import peak_memory
from recipes.common.timing import Action, seconds, synchronise, without_garbage_collection


@dataclass(frozen=True)
class Spread:
    """A median with minimum and maximum."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Median, minimum and maximum of at least one value."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Ratio:
    """The ratio of two interleaved timings.

    Attributes:
        name: Numerator and denominator in words, for the table.
        numerator: Seconds, one value for each round.
        denominator: Seconds, one value for each round, above 0.
        bar: Upper bound of the ratio; None for no bound.
    """

    name: str
    numerator: tuple[float, ...]
    denominator: tuple[float, ...]
    bar: float | None = None

    @property
    def spread(self) -> Spread:
        """Median, minimum and maximum of the ratios of the rounds."""
        return Spread.of([a / b for a, b in zip(self.numerator, self.denominator, strict=True)])


@dataclass(frozen=True)
class Amount:
    """An absolute measurement.

    Attributes:
        name: Name of the measured quantity.
        unit: Unit, `s` or `MB` (10^6 bytes).
        values: Values, one for each repeat.
        bar: Upper bound of the median; None for no bound.
    """

    name: str
    unit: str
    values: tuple[float, ...]
    bar: float | None = None


@dataclass(frozen=True)
class Growth:
    """The scaling of a quantity with a size.

    Attributes:
        name: Name of the quantity.
        axis: Name of the size.
        unit: Unit, `s` or `MB` (10^6 bytes).
        sizes: Sizes in ascending order.
        values: Value at each size, above 0; the median of times.
        raw: All values at each size.
        bar: Upper bound of the exponent; None for no bound.
    """

    name: str
    axis: str
    unit: str
    sizes: tuple[int, ...]
    values: tuple[float, ...]
    raw: tuple[tuple[float, ...], ...]
    bar: float | None = None

    @property
    def exponent(self) -> float:
        """The p of `size^p`; see `growth_exponent`."""
        return growth_exponent(self.sizes, self.values)


@dataclass(frozen=True)
class Peer:
    """Comparison of another library (the peer) with this one on the same work.

    Attributes:
        name: Name of the peer.
        work: Work that both did.
        peer_seconds: Seconds of the peer, one value for each round; empty if it failed.
        our_seconds: Seconds of this library, one value for each round.
        peer_megabytes: Peak memory of the peer beyond the model, in 10^6 bytes; None if it failed.
        our_megabytes: Peak memory of this library, likewise.
        difference: Largest difference of the results relative to the largest entry; None where both need not give the
            same result.
        error: Error of the peer; None if it ran.
    """

    name: str
    work: str
    peer_seconds: tuple[float, ...]
    our_seconds: tuple[float, ...]
    peer_megabytes: float | None
    our_megabytes: float
    difference: float | None
    error: str | None


@dataclass(frozen=True)
class Section:
    """The results of one section.

    Attributes:
        name: Name on the command line.
        title: Heading.
        notes: Paragraphs on the measurement.
        ratios: Rows of the table of ratios.
        amounts: Rows of the table of amounts.
        growth: Rows of the table of growth.
        peers: Rows of the table of peers.
    """

    name: str
    title: str
    notes: tuple[str, ...]
    ratios: tuple[Ratio, ...] = ()
    amounts: tuple[Amount, ...] = ()
    growth: tuple[Growth, ...] = ()
    peers: tuple[Peer, ...] = ()


def growth_exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The slope of `log value` over `log size` by least squares.

    Raises:
        ValueError: If there are fewer than two different sizes, or a size or value is not above 0.
    """
    if len(set(sizes)) < 2 or min(*sizes, *values) <= 0:
        raise ValueError(f"growth needs two sizes and values above 0, got sizes {list(sizes)}, values {list(values)}")
    return statistics.linear_regression([math.log(x) for x in sizes], [math.log(y) for y in values]).slope


class _EnoughError(Exception):
    """Ends a pass early."""


def batch_in_turn(
    consume: Callable[[Iterable[Any]], object],
    batch: Any,
    actions: Mapping[str, Action],
    repeats: int,
    device: torch.device,
    *,
    to_end: bool = False,
) -> tuple[tuple[float, ...], dict[str, tuple[float, ...]]]:
    """Time the marginal cost of a batch in a pass over batches, interleaved with other actions.

    The first batch, which includes the set-up, is not counted: a batch's time is that between yielding it and the
    request for the next one.

    Args:
        consume: Function that iterates over the batches.
        batch: Batch that is yielded repeatedly.
        actions: Functions that run between the batches, by name.
        repeats: Number of batches that are timed.
        device: Device that they run on.
        to_end: Whether the pass ends by itself, rather than with an exception when the last batch was timed.

    Returns:
        Seconds of each batch, and of each action by name.
    """
    for action in actions.values():
        action()
    times: dict[str, list[float]] = {name: [] for name in actions}
    own: list[float] = []

    def batches() -> Iterator[Any]:
        yield batch
        for _ in range(repeats):
            for name, action in actions.items():
                times[name].append(seconds(action, device))
            with without_garbage_collection():
                synchronise(device)
                start = time.perf_counter()
                yield batch
                synchronise(device)
                own.append(time.perf_counter() - start)
        if not to_end:
            raise _EnoughError

    with suppress(_EnoughError):
        consume(batches())
    if len(own) < repeats:
        raise RuntimeError("the timed pass did not ask for all of its batches; time a function that iterates over them")
    return tuple(own), {name: tuple(values) for name, values in times.items()}


@dataclass(frozen=True)
class Pass:
    """A pass over a few batches of which the later ones are timed.

    Attributes:
        consume: Function that iterates over the batches.
        batch: Batch that is yielded.
        to_end: Whether it runs to its end, since it leaves hooks in the model after an exception. Otherwise it ends
            before its last step, a decomposition, say.
    """

    consume: Callable[[Iterable[Any]], object]
    batch: Any
    to_end: bool = False

    def __call__(self) -> None:
        """Run the batches."""
        self.further_batch(torch.device("cpu"))

    def further_batch(self, device: torch.device) -> float:
        """Seconds of a batch once the pass runs evenly, the mean of two; see `batch_in_turn`.

        The first batches allocate memory, and a peer asks for one of them in advance.
        """
        own, _ = batch_in_turn(self.consume, self.batch, {}, 3, device, to_end=self.to_end)
        return statistics.mean(own[1:])


@contextmanager
def time_inside(owner: type, method: str, device: torch.device) -> Iterator[list[float]]:
    """Collect the seconds of each call of a method of a class, synchronised with the device."""
    spent: list[float] = []
    original = getattr(owner, method)

    def timed(*args: Any, **kwargs: Any) -> None:
        spent.append(seconds(lambda: original(*args, **kwargs), device))

    with mock.patch.object(owner, method, timed):
        yield spent


def peak_megabytes(action: Action, device: torch.device, known: Iterable[Tensor] = ()) -> float:
    """Peak memory of an action beyond what was allocated before, in 10^6 bytes.

    On a GPU it is that of the caching allocator, on the CPU that of all live storages.

    Args:
        action: Function, which is called once.
        device: Device that it runs on.
        known: Tensors that were allocated before, left out of the memory.
    """
    with peak_memory(device, known) as memory:
        action()
        return memory.peak / 1e6
