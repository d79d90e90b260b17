"""Runs a function in several processes with a gloo group."""

from __future__ import annotations

import multiprocessing
import traceback

import torch
import torch.distributed as dist


def run(function, world_size, folder):
    """Call `function(rank, world_size)` in as many processes; whatever goes wrong there fails the test."""
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=enter, args=(function, rank, world_size, folder)) for rank in range(world_size)]
    for child in children:
        child.start()
    for child in children:
        child.join(timeout=60)
    hanging = [child for child in children if child.is_alive()]
    for child in hanging:
        child.kill()
    said = "\n".join(path.read_text() for path in sorted(folder.glob("error-*")))
    assert not said, said
    assert not hanging
    assert [child.exitcode for child in children] == [0] * world_size


def enter(function, rank, world_size, folder):
    try:
        torch.set_num_threads(1)
        store = dist.FileStore(str(folder / "store"), world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        dist.barrier()  # nobody leaves while others still connect
        function(rank, world_size)
        dist.destroy_process_group()
    except BaseException:  # noqa: BLE001  (told to the parent)
        (folder / f"error-{rank}").write_text(traceback.format_exc())
