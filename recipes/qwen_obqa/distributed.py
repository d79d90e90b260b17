"""Runs on several processes, started by torchrun: all ranks run the same stages, and rank zero writes and prints.

Rank zero alone checks which files exist, and broadcasts the result: a file may appear while other ranks check for it.
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
from recipes.common.errors import RecipeError
from recipes.qwen_obqa.settings import ResolvedSettings

T = TypeVar("T")


@contextmanager
def joined(settings: ResolvedSettings) -> Iterator[None]:
    """Initialise the default process group if torchrun started this process, and destroy it afterwards."""
    if not dist.is_torchelastic_launched() or dist.is_initialized():
        yield
        return
    on_gpu = settings.accelerator != "cpu" and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # The other ranks wait while one loads a large model, which may exceed NCCL's default timeout.
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(minutes=30))
    try:
        yield
    finally:
        gc.collect()  # a sharded model that is still referenced would keep gloo's threads alive
        dist.destroy_process_group()


def trainer_options(settings: ResolvedSettings) -> dict[str, Any]:
    """The arguments `devices`, `num_nodes` and `strategy` of the trainer."""
    processes = num_processes()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if processes > 1 else 1
    strategy: Any = "auto" if processes == 1 else "ddp"
    if settings.strategy == "sharded":
        strategy = ModelParallelStrategy(data_parallel_size=processes, tensor_parallel_size=1)
    return {"devices": local, "num_nodes": processes // local, "strategy": strategy}


def agreed(value: bool) -> bool:
    """Broadcast a boolean from rank zero. A collective."""
    return bool(gather_number(int(value))[0])


def first_then_others(action: Callable[[], T]) -> T:
    """Call a function on rank zero, then on the other ranks, which find the files that it wrote. A collective.

    Args:
        action: Function to call.

    Returns:
        What the function returned on this rank.

    Raises:
        RecipeError: If the function raises it on rank zero; on the other ranks without a message.
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
    return result  # type: ignore[return-value]  # set in either branch
