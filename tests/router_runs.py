"""Bayesian routers that are trained on several processes; each process writes down what it has to say.

Lightning runs this script once more for every other process: `python router_runs.py FOLDER users|finetuner WORLD_SIZE`.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path

import torch
from distributed_runs import leave, options
from finetuner_runs import Questions
from lightning.pytorch.callbacks import ModelCheckpoint
from router_cases import BETA, SEED, Gradients, UsersModule, explicit, perturbed
from sharded_runs import rank, strategy
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.data import DataLoader, DistributedSampler
from toy import ToyData, loader, toy_model, trainer

from bmoe_lightning import RouterFinetuner, RouterTrainingCallback
from bmoe_lightning.experts.fsdp import full_tensor, has_shards

SIZE = 4


class Sharded(UsersModule):
    """The user's module, which shards its model as FSDP2 asks for."""

    def configure_model(self):
        if self.device_mesh is None or isinstance(self.network, FSDPModule):
            return
        mesh = self.device_mesh["data_parallel"]
        for block in self.network.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(self.network, mesh=mesh)


class Whole(Gradients):
    """Gathers the gradients of shards."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        first = not self.found
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if first:
            self.found = {name: full_tensor(value) for name, value in self.found.items()}


def expected(world_size: int) -> dict:
    """The mean over ranks of the gradients that each one's batch gives, in this process alone."""
    sums: dict = {}
    for number in range(world_size):
        module = perturbed(UsersModule())
        rows = [{name: values[number::world_size] for name, values in batch.items()} for batch in whole_batches()]
        found = explicit(module, rows, seed=SEED * world_size + number)
        for name, value in found.items():
            sums[name] = sums.get(name, 0) + value / world_size
    return sums


def whole_batches():
    return list(loader(2 * SIZE, 1, batch_size=SIZE))


def users(world_size: int, folder: Path) -> None:
    """The gradients of one step, of DDP and FSDP2, beside those of one process for each rank's batches."""
    wanted, said = expected(world_size), {}
    for kind, chosen in (("ddp", {"strategy": "ddp"}), ("sharded", {"strategy": strategy(world_size)})):
        found = Whole()
        callback = RouterTrainingCallback(beta=BETA, seed=SEED)
        given = options(world_size, **{"precision": "32-true", "max_epochs": 1, **chosen})
        run = trainer(folder / kind, [callback, found], **given, accumulate_grad_batches=2)
        module = perturbed(Sharded())
        rows = ToyData(2 * SIZE, 1)
        # Lightning's own would shuffle.
        own = DistributedSampler(rows, world_size, int(os.environ.get("LOCAL_RANK", "0")), shuffle=False)
        run.fit(module, DataLoader(rows, batch_size=SIZE // world_size, sampler=own))
        assert has_shards(module) == (kind == "sharded")
        said[kind] = {
            "names": sorted(found.found) == sorted(wanted),
            "largest": max(float((found.found[n] - wanted[n]).abs().max()) for n in wanted),
            "size": min(float(wanted[n].abs().max()) for n in wanted if n.startswith("bayesian_routers.")),
        }
    (folder / f"users-{rank()}.json").write_text(json.dumps(said))


def finetuner(world_size: int, folder: Path) -> None:
    """`RouterFinetuner` with DDP and FSDP2: the same training, and checkpoints that load in one process."""
    data, said = DataLoader(Questions(32, 1), batch_size=8), {}
    for kind, chosen in (("ddp", {"strategy": "ddp"}), ("sharded", {"strategy": strategy(world_size)})):
        saver = ModelCheckpoint(folder / kind, filename="last")
        given = options(world_size, **{"precision": "32-true", "max_epochs": 2, "enable_checkpointing": True, **chosen})
        run = trainer(folder / kind, [saver], **given, gradient_clip_val=1.0)
        module = RouterFinetuner(toy_model(), [1, 2, 3], learning_rate=1e-2, num_samples=2, seed=1)
        run.fit(module, data, DataLoader(Questions(16, 2), batch_size=8))
        assert has_shards(module) == (kind == "sharded")
        trained = {name: full_tensor(parameter) for name, parameter in module.trained_parameters().items()}
        said[kind] = {
            "sums": {name: float(value.double().abs().sum()) for name, value in trained.items()},
            "scales": [float(net.prior_scale) for net in module.routers.nets],
            "kl": float(run.callback_metrics["router/kl"]),
            "val": float(run.callback_metrics["val/loss"]),
        }
        run.test(module, DataLoader(Questions(16, 3), batch_size=8), verbose=False)
        said[kind]["test"] = float(run.callback_metrics["test/loss"])
        if rank() == 0 and kind == "ddp":
            loaded = RouterFinetuner.load_from_checkpoint(folder / kind / "last.ckpt", model=toy_model())
            said[kind]["loaded"] = all(
                torch.equal(parameter.cpu(), trained[name].cpu())
                for name, parameter in loaded.trained_parameters().items()
            )
    (folder / f"finetuner-{rank()}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    where, kind, size = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    {"users": users, "finetuner": finetuner}[kind](size, where)
    leave()
