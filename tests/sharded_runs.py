"""Fit, test and predict with weights that FSDP2 shards, and write down what each process has to say.

Lightning runs this script once more for every other process: `python sharded_runs.py FOLDER whole|parts WORLD_SIZE`.
The folder holds what `distributed_runs.py FOLDER whole 1` has left.
"""

from __future__ import annotations

import json
import os
import sys
import types
import warnings
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist
from distributed_runs import (
    CALIBRATION,
    TEST,
    TRAIN,
    SameWeights,
    Witness,
    leave,
    methods,
    options,
    plain_logits,
    watch_writing,
    writes,
)
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from resumed_runs import Killed, stopping
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from toy import ToyData, loader, toy_model, trainer

from bmoe_lightning import BayesianMoECallback, LaplacePosterior
from bmoe_lightning.curvature import collect_factors, remove_checkpoint
from bmoe_lightning.experts import down_proj_weights, find_expert_layers, squared_distances, weight_fingerprint
from bmoe_lightning.experts.counted_batch import CountedBatch
from bmoe_lightning.experts.fsdp import full_tensor, has_shards, local_part, reshard, shard_blocks
from bmoe_lightning.methods import apply_snapshot, save_snapshot, swapped_weights


def strategy(world_size: int, **others) -> ModelParallelStrategy:
    return ModelParallelStrategy(data_parallel_size=world_size, tensor_parallel_size=1, **others)


class ShardedWeights(SameWeights):
    """The same, with its weights in parts."""

    def configure_model(self):
        mesh = self.device_mesh["data_parallel"]
        if not isinstance(self.network, FSDPModule):
            for block in self.network.model.layers:
                fully_shard(block, mesh=mesh)
            fully_shard(self.network, mesh=mesh)


class Attempts:
    """Tries what must be refused, and keeps what was said."""

    def __init__(self) -> None:
        self.said: dict[str, str] = {}

    def __call__(self, name, attempt) -> None:
        try:
            attempt()
        except ValueError as error:
            self.said[name] = str(error)


def end_to_end(world_size: int, folder: Path) -> None:
    """All methods, from fitting to prediction."""
    callback = BayesianMoECallback(
        methods(folder),
        dirpath=str(folder / f"written-{world_size}"),
        predict_method="laplace_lpo",
    )
    module = ShardedWeights(folder / "trained.safetensors").double()
    wanted = {
        "strategy": strategy(world_size),
        "logger": TensorBoardLogger(folder, name=f"logs-{world_size}", version="run"),
        "precision": "32-true",  # which leaves a module as it is
    }
    run = trainer(folder, [callback, Witness(folder, callback)], **options(world_size, **wanted))
    run.fit(module, loader(TRAIN, 1, shuffle=True, batch_size=8), loader(CALIBRATION, 2))
    reshard(module)
    assert {type(parameter.data).__name__ for parameter in module.parameters()} == {"DTensor"}
    assert all(parameter.requires_grad for parameter in module.parameters())
    writes.clear()
    run.test(module, loader(TEST, 3), verbose=False)
    run.predict(module, loader(TEST - TEST % 6, 3), return_predictions=False)
    attempts = Attempts()
    attempts("predict", lambda: run.predict(module, loader(TEST, 3)))
    for name, other, given in (
        ("best", BayesianMoECallback(fit_at="best"), strategy(world_size)),
        ("tensor", BayesianMoECallback(), ModelParallelStrategy(data_parallel_size=1)),
    ):
        refused = trainer(folder, [other], **options(world_size, precision="32-true", strategy=given))
        attempts(name, lambda refused=refused: refused.fit(module, loader(TRAIN, 1), loader(CALIBRATION, 2)))
    (folder / f"refusals-{run.global_rank}.json").write_text(json.dumps(attempts.said))


class Expert(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 10), nn.Linear(10, width)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


class Block(nn.Module):
    def __init__(self, width: int, num_experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, num_experts, bias=False)
        self.experts = nn.ModuleList(Expert(width) for _ in range(num_experts))

    def forward(self, x):
        shares = self.router(x).softmax(-1).topk(2)
        output = x
        for expert, module in enumerate(self.experts):
            share = (shares.values * (shares.indices == expert)).sum(-1, keepdim=True)
            output = output + share * module(x)
        return output


class Separate(nn.Module):
    """Experts as modules of their own, of which none has a block."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embedding, self.head = nn.Embedding(24, 8), nn.Linear(8, 24)
            self.model = nn.Module()
            self.model.layers = nn.ModuleList(Block(8, 3) for _ in range(2))

    def forward(self, input_ids, use_cache=False):
        x = self.embedding(input_ids)
        for block in self.model.layers:
            x = block(x + x.mean(1, keepdim=True))
        return types.SimpleNamespace(logits=self.head(x))


def build(name: str) -> nn.Module:
    if name == "modules":
        return Separate().double()
    model = toy_model().double()
    model.set_experts_implementation("eager")  # the default has no float64
    return model


def answers(model, batch):
    return model(input_ids=batch["input_ids"], use_cache=False).logits[:, -1, [1, 2, 3]], batch["labels"]


def parts(world_size: int, folder: Path) -> None:
    """Plain PyTorch: factors, distances, fingerprint, predictions and borrowed weights, in parts and as a whole."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store-{world_size}", rank=rank(), world_size=world_size
    )
    data = ToyData(24, 1)
    batches = [{"input_ids": data.ids[i : i + 4], "labels": data.labels[i : i + 4]} for i in range(0, 24, 4)]
    found = {name: of_model(name, world_size, folder, batches) for name in ("fused", "modules")}
    found["snapshots"] = snapshots(world_size, folder / f"fused-{world_size}.safetensors", batches[0])
    found["refused"] = refused(world_size, batches)
    (folder / f"parts-{world_size}-{rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def of_model(name: str, world_size: int, folder: Path, batches) -> dict:
    model = build(name)
    layers = find_expert_layers(model)
    snapshot = folder / f"{name}-{world_size}.safetensors"
    if rank() == 0:
        weights = {n: -value for layer in layers for n, value in down_proj_weights(model, layer).items()}
        save_snapshot(snapshot, weights)
    dist.barrier()
    before = {n: value.clone() for layer in layers for n, value in down_proj_weights(model, layer).items()}
    with torch.no_grad():
        for weight in before:
            model.get_parameter(weight).mul_(0.9)
        expected = observed(model, batches, before, snapshot)
    kinds = {
        "FSDP": (init_device_mesh("cpu", (world_size,)), 0),
        "HSDP": (init_device_mesh("cpu", (world_size, 1), mesh_dim_names=("replicas", "shards")), 0),
        "by width": (init_device_mesh("cpu", (world_size,)), 1),
        "recomputed": (init_device_mesh("cpu", (world_size,)), 0),
    }
    found = {}
    for kind, (mesh, dim) in kinds.items():
        sharded = build(name)
        sharded.load_state_dict(model.state_dict())
        place = None if dim == 0 else (lambda parameter: shard_dimension(parameter, world_size))
        for block in sharded.model.layers:
            fully_shard(block, mesh=mesh, shard_placement_fn=place)
        fully_shard(sharded, mesh=mesh)
        if kind == "recomputed" and name == "fused":
            sharded.gradient_checkpointing_enable({"use_reentrant": False})
        for parameter_name, parameter in sharded.named_parameters():
            parameter.requires_grad_("experts" in parameter_name)
        sharded.train()
        with torch.no_grad():
            sharded(input_ids=batches[0]["input_ids"])  # which leaves the root's weights in one piece
        mine = {n: local_part(w).values.clone() for x in layers for n, w in down_proj_weights(sharded, x).items()}
        found[kind] = differences(observed(sharded, batches, before, snapshot), expected)
        found[kind]["distances from parts"] = apart(
            squared_distances(sharded, layers, mine), [torch.zeros(x.num_experts) for x in layers]
        )
        wants_gradients = {n for n, p in sharded.named_parameters() if p.requires_grad}
        assert wants_gradients == {n for n, _ in sharded.named_parameters() if "experts" in n}
        assert sharded.training
        sum(logits.sum() for logits, _ in (answers(sharded, batch) for batch in batches)).backward()  # training goes on
        gradients = {n: p.grad is not None for n, p in sharded.named_parameters()}
        assert {n for n, there in gradients.items() if there} == wants_gradients
    return found


def snapshots(world_size: int, snapshot: Path, batch) -> dict:
    """A snapshot borrowed before the first forward, which is when FSDP2 settles where the parts are, and taken over."""
    plain, other, sharded = (build("fused") for _ in range(3))
    apply_snapshot(other, snapshot)
    for block in sharded.model.layers:
        fully_shard(block)
    fully_shard(sharded)
    experts = [p for name, p in sharded.named_parameters() if name.endswith("experts.down_proj")]
    found = {"uneven": any(local_part(p).values.shape[0] * world_size != p.shape[0] for p in experts)}

    @torch.no_grad()
    def differing(expected):
        return apart([answers(sharded, batch)[0]], [answers(expected, batch)[0]])

    with swapped_weights(sharded, snapshot):
        found["inside"] = differing(other)
    found["afterwards"] = differing(plain)
    with swapped_weights(sharded, snapshot):
        found["again"] = differing(other)
    apply_snapshot(sharded, snapshot)
    found["applied"] = differing(other)
    return found


def two_choices(model, batch):
    """A row for each choice; of the third choice, which some examples lack, no logit is looked at."""
    ids = batch["input_ids"]
    rows = torch.stack([ids, ids + 1, ids + 2], dim=1).clamp(max=23).flatten(0, 1)
    logits = model(input_ids=rows, use_cache=False).logits[:, -1, 1].view(-1, 3)
    absent = batch["absent"].unsqueeze(1) & (torch.arange(3) == 2)
    return logits.masked_fill(absent, -torch.inf), batch["labels"].clamp(max=1)


def refused(world_size: int, batches) -> dict:
    """What depends on the data of one process, or goes wrong in one, and what the others make of it."""
    model = build("fused")
    layers = find_expert_layers(model)
    shard_blocks(model, layers, init_device_mesh("cpu", (world_size,)))
    found: dict = {}
    # Only one process sees examples without a third choice, whose rows no logit comes from.
    seen = [{**b, "absent": torch.full((len(b["labels"]),), rank() == world_size - 1)} for b in batches[:3]]
    for approximation in ("expand", "reduce"):
        factors = collect_factors(model, two_choices, seen, rank=3, approximation=approximation, distributed=True)
    posterior = LaplacePosterior(factors)
    found["absent"] = float(posterior.predict(model, two_choices, seen[0]).exp().sum(1).sub(1).abs().max())
    kinds = {
        "uneven": lambda: collect_factors(model, answers, batches[: 2 + (rank() == 0)], rank=3, distributed=True),
        "uneven calibration": lambda: plain_logits(model, answers, batches[: 2 + (rank() == 0)], distributed=True),
        "alone": lambda: collect_factors(model, answers, batches, rank=3),
    }
    attempts = Attempts()
    for name, attempt in kinds.items():
        attempts(name, attempt)
        dist.barrier()
    # In the middle of a forward, of all processes at once.
    reshard(model)  # a plain forward leaves what lies in no block in one piece
    before = {n: (type(p.data), p.requires_grad) for n, p in model.named_parameters()}
    for handle in (model.model.layers[1].mlp.register_forward_hook(fail), head_gradient_fails(model)):
        attempts("inside", lambda: collect_factors(model, answers, batches, rank=3, distributed=True))
        handle.remove()
        assert {n: (type(p.data), p.requires_grad) for n, p in model.named_parameters()} == before
        dist.barrier()
    again = collect_factors(model, two_choices, seen, rank=3, approximation="reduce", distributed=True)
    found["afterwards"] = apart([x.curvature() for x in again.layers], [x.curvature() for x in factors.layers])
    partly = build("fused")
    fully_shard(partly.model, mesh=init_device_mesh("cpu", (world_size,)))  # and not the head
    with torch.no_grad():
        partly.lm_head.weight.add_(rank())
    attempts("copies", lambda: weight_fingerprint(partly, layers))
    return {**found, "said": attempts.said}


def fail(*_):
    raise ValueError("stopped inside")


def head_gradient_fails(model):
    """Fails in the backward pass."""
    return model.model.layers[1].register_forward_hook(lambda _, __, output: output.register_hook(fail) and None)


def shard_dimension(parameter, world_size):
    """The second dimension where it can be cut evenly, as FSDP2 demands of all but the first."""
    from torch.distributed.tensor import Shard

    return Shard(1) if parameter.dim() == 3 and parameter.shape[1] % world_size == 0 else Shard(0)


def observed(model, batches, before, snapshot) -> dict:
    """All that looks at weights; a sharded model sees its share of the batches, some examples once too often."""
    sharded = has_shards(model)
    layers = find_expert_layers(model)
    seen = batches
    if sharded:
        seen = batches[rank() :: dist.get_world_size()]
        padding = batches[0]
        repeated = {n: torch.cat([v, padding[n][:2]]) for n, v in seen[-1].items()}
        seen = [*seen[:-1], CountedBatch(repeated, 4, 6), CountedBatch(padding, 0, 4)]
    results: dict = {}
    for fisher, approximation in (("exact", "expand"), ("empirical", "reduce")):
        factors = collect_factors(
            model, answers, seen, rank=3, fisher=fisher, approximation=approximation, distributed=sharded
        )
        results[f"{fisher} {approximation}"] = [layer.curvature() for layer in factors.layers]
        results[f"{fisher} slots"] = [layer.slots for layer in factors.layers]
        assert (factors.num_examples, factors.num_examples_used) == (24, 24)
    results["resumed"] = [layer.curvature() for layer in resumed(model, seen, snapshot, distributed=sharded).layers]
    results["distances"] = squared_distances(model, layers, before)
    results["norms"] = squared_distances(model, layers, None)
    results["fingerprint"] = weight_fingerprint(model, layers)
    assert factors.fingerprint == results["fingerprint"]
    posterior = LaplacePosterior(factors)
    results["predictions"] = [posterior.predict(model, answers, batch) for batch in batches[:2]]
    with torch.no_grad():
        model(input_ids=batches[0]["input_ids"])
    bound = posterior._bound
    posterior.predict(model, answers, batches[0])
    assert posterior._bound is bound  # weights that were put together for a while are no other weights
    partly = posterior.batch_terms(model, answers, CountedBatch(batches[0], 3, 4))
    results["some"] = [partly.logits, posterior.covariance_of(partly)]
    every = posterior.batch_terms(model, answers, batches[0])
    for mine, full in zip(results["some"], (every.logits, posterior.covariance_of(every)), strict=True):
        torch.testing.assert_close(mine, full[:3], rtol=1e-9, atol=1e-12)
    with swapped_weights(model, snapshot), torch.no_grad():
        results["borrowed"] = [answers(model, batches[0])[0]]
        results["borrowed fingerprint"] = weight_fingerprint(model, layers)
    assert results["borrowed fingerprint"] != results["fingerprint"]
    assert weight_fingerprint(model, layers) == results["fingerprint"]
    results["whole"] = [
        full_tensor(value).clone() for layer in layers for value in down_proj_weights(model, layer).values()
    ]
    return results


def resumed(model, seen, snapshot, *, distributed):
    """Factors of a pass that is cut off between two batches, where nobody waits for anybody, and goes on."""
    sums = snapshot.with_name(f"sums-{snapshot.stem}" if distributed else f"sums-{snapshot.stem}-{rank()}")
    kept = {"rank": 3, "distributed": distributed, "checkpoint": sums, "checkpoint_every": 2}
    with suppress(Killed):
        collect_factors(model, answers, stopping(seen, 2), **kept)
    calls = []

    def counted(m, batch):
        calls.append(0)
        return answers(m, batch)

    factors = collect_factors(model, counted, seen, **kept)
    assert len(calls) == len(seen) - 2
    remove_checkpoint(sums)
    dist.barrier()
    return factors


def apart(found, expected) -> float:
    """The largest difference of tensors."""
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))


def differences(found: dict, expected: dict) -> dict:
    assert found.keys() == expected.keys()
    return {
        name: float(found[name] != value) if isinstance(value, str) else apart(found[name], value)
        for name, value in expected.items()
    }


def rank() -> int:
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", 0)))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    watch_writing()
    where, kind, size = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    {"whole": end_to_end, "parts": parts}[kind](size, where)
    leave()
