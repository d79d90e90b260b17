"""Interleaved timings.

The alternatives of one ratio are interleaved, A B A B, so that other load on the machine affects them equally; a ratio
is taken within each round.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

Action = Callable[[], object]


def synchronise(device: torch.device) -> None:
    """Wait for all kernels on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(action: Action, device: torch.device) -> float:
    """Seconds that an action takes, synchronised with the device, without garbage collection."""
    with without_garbage_collection():
        synchronise(device)
        start = time.perf_counter()
        action()
        synchronise(device)
        return time.perf_counter() - start


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Collect garbage now, and not within this context: one collection costs more than a batch of a small model.

    Within another such context nothing is collected.
    """
    was_enabled = gc.isenabled()
    if was_enabled:
        gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def in_turn(
    actions: Mapping[str, Action],
    repeats: int,
    device: torch.device,
    clock: Callable[[Any, torch.device], float] = seconds,
    *,
    warm_up: bool = True,
) -> dict[str, tuple[float, ...]]:
    """Time interleaved actions, by default after one warm-up run of each.

    Args:
        actions: Functions without arguments, by name.
        repeats: Number of rounds.
        device: Device that they run on.
        clock: Function that runs an action and returns the seconds that count.
        warm_up: Whether each runs once before.

    Returns:
        `repeats` values for each name.
    """
    for action in actions.values() if warm_up else ():
        action()
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(repeats):
        with without_garbage_collection():  # once for all actions of a round
            for name, action in actions.items():
                times[name].append(clock(action, device))
    return {name: tuple(values) for name, values in times.items()}
