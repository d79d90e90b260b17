"""Timings of alternatives in turn, peaks of memory, and what is read off them.

Alternatives that make up one ratio are run in turn, A B A B, so that whatever else the machine does hits them alike; a
ratio is taken within each turn.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from recipes.common.live_bytes import LiveBytes

Action = Callable[[], object]


@dataclass(frozen=True)
class Spread:
    """A median and what lies around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Median, minimum and maximum of at least one value."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Ratio:
    """One thing's time over another's, taken in turn.

    Attributes:
        name: What is divided by what, for the table.
        numerator: Seconds, one value a turn.
        denominator: Seconds, one value a turn, above 0.
        bar: Upper bound of the ratio; None where nothing is promised.
    """

    name: str
    numerator: tuple[float, ...]
    denominator: tuple[float, ...]
    bar: float | None = None

    @property
    def spread(self) -> Spread:
        """Median, minimum and maximum of the ratios of the turns."""
        return Spread.of([a / b for a, b in zip(self.numerator, self.denominator, strict=True)])


@dataclass(frozen=True)
class Amount:
    """Something measured by itself.

    Attributes:
        name: What was measured.
        unit: Unit, `s` or `MB` (10^6 bytes).
        values: One value a repeat.
        bar: Upper bound of the median; None where nothing is promised.
    """

    name: str
    unit: str
    values: tuple[float, ...]
    bar: float | None = None


@dataclass(frozen=True)
class Growth:
    """How something grows with a size.

    Attributes:
        name: What grows.
        axis: Size that it grows with.
        unit: Unit, `s` or `MB` (10^6 bytes).
        sizes: Sizes in ascending order.
        values: Value at each size, above 0; the median, where it is a time.
        raw: All values at each size.
        bar: Upper bound of the exponent; None where nothing is promised.
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
    """Another library beside this one, on the same work.

    Attributes:
        name: Name of the peer.
        work: Work that both did.
        peer_seconds: Seconds of the peer, one value a turn; empty where it could not run.
        our_seconds: Seconds of this library, one value a turn.
        peer_megabytes: Peak memory of the peer beyond the model, in 10^6 bytes; None where it could not run.
        our_megabytes: The same of this library.
        difference: The largest difference of the answers relative to the largest entry; None where they do not promise
            the same answer.
        error: Error that kept the peer from running; None where it ran.
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
        notes: Paragraphs on how it was measured.
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
        ValueError: For fewer than two different sizes, or anything that is not above 0.
    """
    if len(set(sizes)) < 2 or min(*sizes, *values) <= 0:
        raise ValueError(f"growth needs two sizes and values above 0, got sizes {list(sizes)}, values {list(values)}")
    return statistics.linear_regression([math.log(x) for x in sizes], [math.log(y) for y in values]).slope


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(action: Action, device: torch.device) -> float:
    """How long an action takes, to its end on the device."""
    synchronise(device)
    start = time.perf_counter()
    action()
    synchronise(device)
    return time.perf_counter() - start


def in_turn(actions: Mapping[str, Action], repeats: int, device: torch.device) -> dict[str, tuple[float, ...]]:
    """Time actions in turn, after each has run once.

    Returns:
        `repeats` values for each name.
    """
    for action in actions.values():
        action()
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(repeats):
        for name, action in actions.items():
            times[name].append(seconds(action, device))
    return {name: tuple(values) for name, values in times.items()}


class _EnoughError(Exception):
    """Ends a pass before it would finish."""


def batch_in_turn(
    consume: Callable[[Iterable[Any]], object],
    batch: Any,
    actions: Mapping[str, Action],
    repeats: int,
    device: torch.device,
) -> tuple[tuple[float, ...], dict[str, tuple[float, ...]]]:
    """Time what one more batch costs something that runs over batches, in turn with other actions.

    The first batch, with all set-up, is not counted, and the pass is left before it would finish: a batch's time is
    what passes between handing it over and being asked for the next.

    Args:
        consume: Function that takes the batches.
        batch: Batch that is handed over again and again.
        actions: Functions that run between the batches, by name.
        repeats: Number of batches that are timed.
        device: Device that they run on.

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
            synchronise(device)
            start = time.perf_counter()
            yield batch
            synchronise(device)
            own.append(time.perf_counter() - start)
        raise _EnoughError

    try:
        consume(batches())
    except _EnoughError:
        return tuple(own), {name: tuple(values) for name, values in times.items()}
    raise RuntimeError("what was timed did not ask for all of its batches")


@contextmanager
def time_inside(owner: type, method: str, device: torch.device) -> Iterator[list[float]]:
    """Collect the seconds that a class spends in one of its methods; on a GPU each call is waited for."""
    spent: list[float] = []
    original = getattr(owner, method)

    def timed(*args: Any, **kwargs: Any) -> None:
        spent.append(seconds(lambda: original(*args, **kwargs), device))

    with mock.patch.object(owner, method, timed):
        yield spent


def peak_megabytes(action: Action, device: torch.device, known: Iterable[Tensor] = ()) -> float:
    """The most memory that an action holds at once beyond what was there before, in 10^6 bytes.

    On a GPU what its allocator says, else the storages of all tensors that are alive.

    Args:
        action: Function that runs once.
        device: Device that it runs on.
        known: Tensors that were allocated before, left out of the memory.
    """
    if device.type == "cuda":
        synchronise(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        action()
        synchronise(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    with LiveBytes() as live:
        live.known(known)
        action()
    return live.peak / 1e6
