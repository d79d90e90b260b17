"""Curvature passes that are killed on several processes and resume; each process writes down what it has to say.

A script of its own, since a process that has run a backward pass cannot be forked: `python resumed_runs.py FOLDER
resumed WORLD_SIZE...`.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from distributed_runs import SameWeights, leave, train_elsewhere
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Subset
from toy import ToyData

from bmoe_lightning.curvature import collect_factors, remove_checkpoint
from bmoe_lightning.curvature.checkpoint import rank_path
from bmoe_lightning.utils.distributed import OtherRankError


class Killed(Exception):
    pass


def stopping(batches, after: int):
    for number, batch in enumerate(batches):
        if number == after:
            raise Killed
        yield batch


def resumed(world_size: int, folder: Path, weights: Path) -> None:
    """Curvature that is cut off on all processes and goes on."""
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=resuming, args=(r, world_size, folder, weights)) for r in range(world_size)]
    for child in children:
        child.start()
    for child in children:
        child.join()


def remove_own(path: Path) -> None:
    """Remove all that one process has written."""
    for file in path.parent.glob(f"{path.name}*"):
        file.unlink()


def resuming(rank: int, world_size: int, folder: Path, weights: Path) -> None:
    store = dist.FileStore(str(folder / f"store-{world_size}"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    module = SameWeights(weights).double()
    batches = list(DataLoader(Subset(ToyData(25, 1), range(rank, 25, world_size)), batch_size=2))
    path = folder / f"sums-{world_size}.safetensors"
    calls, said = [], {}

    def class_logits(model, batch):
        calls.append(time.monotonic())
        if rank == 1:
            time.sleep(0.2)  # the others would be far ahead of it
        return model.class_logits(batch)

    def collect(name, data=batches, **options):
        calls.clear()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            error = None
            try:
                factors = collect_factors(module, class_logits, data, rank=3, distributed=True, **options)
                found = {f"{i}.{n}": t for i, layer in enumerate(factors.layers) for n, t in layer.tensors().items()}
                save_file(
                    {n: t.contiguous() for n, t in found.items()}, folder / f"{name}-{world_size}-{rank}.safetensors"
                )
            except (Killed, ValueError, OtherRankError) as raised:
                error = str(raised)
        files = sorted(p.name for p in folder.glob(f"*sums-{world_size}*"))
        said[name] = {
            "calls": len(calls),
            "times": list(calls),
            "error": error,
            "warned": [str(w.message) for w in caught],
            "files": files,
        }
        dist.barrier()

    for fisher, sketch in (("exact", "nystrom"), ("mc", "exact")):
        options = {"fisher": fisher, "sketch": sketch}
        kept = {**options, "checkpoint": path, "checkpoint_every": 2}
        collect(f"{fisher}-whole", **options)
        collect(f"{fisher}-killed", stopping(batches, 3), **kept)
        collect(f"{fisher}-resumed", **kept)
        collect(f"{fisher}-finished", **kept)  # killed after its last batch
        remove_checkpoint(path)
        dist.barrier()
    options = {"checkpoint": path, "checkpoint_every": 1}
    collect("differing-killed", stopping(batches, 3), **options)
    if rank == 1:  # killed between two writes of its own
        rank_path(path, distributed=True).unlink()
    dist.barrier()
    collect("differing-resumed", **options)
    remove_checkpoint(path)
    dist.barrier()
    collect("missing-killed", stopping(batches, 3), **options)
    if rank == 1:
        remove_own(rank_path(path, distributed=True))
    dist.barrier()
    collect("missing-resumed", **options)
    if rank == 1:
        own = rank_path(path, distributed=True)
        own.write_bytes(own.read_bytes()[:-100])
    dist.barrier()
    collect("damaged", **options)
    remove_checkpoint(path)
    dist.barrier()
    collect("removed", batches[:0] if rank else batches, checkpoint=path, checkpoint_every=2)
    collect("nothing-again", batches[:0] if rank else batches, checkpoint=path, checkpoint_every=2)
    (folder / f"resumed-{world_size}-{rank}.json").write_text(json.dumps({"said": said, "batches": len(batches)}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    where = Path(sys.argv[1])
    train_elsewhere(where / "trained.safetensors")
    for size in sys.argv[3:]:
        resumed(int(size), where, where / "trained.safetensors")
    leave()
