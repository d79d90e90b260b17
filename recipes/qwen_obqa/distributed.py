"""A run on several processes: all go through the same stages, and the first one writes and talks for them.

They are started by torchrun. What is decided by looking at files is decided by the first process for all: files come
into being while the others are still looking.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy

from bmoe_lightning.utils.distributed import barrier, gather_number, is_rank_zero, num_processes
from recipes.qwen_obqa.settings import ResolvedSettings
from recipes.qwen_obqa.sources import RecipeError

T = TypeVar("T")


@contextmanager
def joined(settings: ResolvedSettings) -> Iterator[None]:
    """Have the processes that torchrun started find each other; alone, nothing happens."""
    if not dist.is_torchelastic_launched() or dist.is_initialized():
        yield
        return
    on_gpu = settings.accelerator != "cpu" and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # While one process loads a large model the others wait for it, longer than NCCL does by itself.
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(minutes=30))
    try:
        yield
    finally:
        gc.collect()  # a sharded model that is left over would keep gloo's threads beyond the group
        dist.destroy_process_group()


def trainer_options(settings: ResolvedSettings) -> dict[str, Any]:
    """Devices, nodes and strategy of a trainer."""
    processes = num_processes()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if processes > 1 else 1
    strategy: Any = "auto" if processes == 1 else "ddp"
    if settings.strategy == "sharded":
        strategy = ModelParallelStrategy(data_parallel_size=processes, tensor_parallel_size=1)
    return {"devices": local, "num_nodes": processes // local, "strategy": strategy}


def agreed(value: bool) -> bool:
    """What the first process says. A collective."""
    return bool(gather_number(int(value))[0])


def first_then_others(action: Callable[[], T]) -> T:
    """Do something in the first process, then in the others, which find the files that it has made. A collective.

    Raises:
        RecipeError: the first process's own, there; in the others an empty one.
    """
    if num_processes() == 1:
        return action()
    error = result = None
    if is_rank_zero():
        try:
            result = action()
        except RecipeError as found:
            error = found
    if agreed(error is not None):
        raise error or RecipeError
    if not is_rank_zero():
        result = action()
    barrier()
    return result  # type: ignore[return-value]  # done in either branch
