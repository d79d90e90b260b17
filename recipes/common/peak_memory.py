"""Peak memory of the phases of a computation, on a GPU or the CPU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from recipes.common.live_bytes import LiveBytes


class PeakMemory:
    """Peak memory beyond what was allocated when the context of `peak_memory` began."""

    def __init__(self, device: torch.device, live: LiveBytes | None) -> None:
        self._device = device
        self._live = live
        self._before = 0 if live is not None else self._restarted()

    def restart(self) -> None:
        """Begin a phase: its peak includes what earlier ones left allocated, and not their peaks."""
        if self._live is not None:
            self._live.peak = self._live.alive
        else:
            self._restarted()

    @property
    def peak(self) -> int:
        """Bytes of the peak since the last `restart`."""
        if self._live is not None:
            return self._live.peak
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device) - self._before

    def _restarted(self) -> int:
        torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        return torch.cuda.memory_allocated(self._device)


@contextmanager
def peak_memory(device: torch.device, known: Iterable[Tensor] = ()) -> Iterator[PeakMemory]:
    """Measure peak memory: on a GPU that of the caching allocator, on the CPU that of all live storages.

    On the CPU every operation takes longer meanwhile, so that times are measured separately.

    Args:
        device: Device of the computation.
        known: Tensors that were allocated before, left out of the memory.
    """
    if device.type == "cuda":
        yield PeakMemory(device, None)
        return
    with LiveBytes() as live:
        live.known(known)
        yield PeakMemory(device, live)
