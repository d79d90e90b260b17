"""Launch lines of `recipes.qwen_obqa` on one device and on several, and the memory of each device.

With DDP every device holds a replica of the model, and the gradients once more in the all-reduce buckets. With FSDP2
it holds a shard of weights, gradients and optimiser states, and temporarily what is all-gathered: the weights outside
of the blocks during each step, and the weights of three blocks (the current one, the prefetched one, and the all-gather
buffer) with the unsharded gradients of two, before they are reduce-scattered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from recipes.plan.architecture import Architecture, Experts
from recipes.plan.memory import Training

GPUS = 8
NODES = 2
_RECIPE = "-m recipes.qwen_obqa"
_HUB_IDS = {"qwen1.5-moe-a2.7b": "Qwen/Qwen1.5-MoE-A2.7B", "deepseek-moe-16b": "deepseek-ai/deepseek-moe-16b-base"}
_PRECISIONS = {torch.bfloat16: "bf16-true", torch.float32: "32-true"}
# Number of blocks with unsharded weights, and with unsharded gradients, at the same time.
_BLOCKS_TOGETHER = 3
_GRADIENTS_TOGETHER = 2


@dataclass(frozen=True)
class Launch:
    """One way to launch a run.

    Attributes:
        name: Name in the table.
        command: Command line, the same on each node.
        processes: Number of processes, one for each device.
        sharded: Whether weights are sharded over the devices.
        training: Memory of each device.
    """

    name: str
    command: str
    processes: int
    sharded: bool
    training: Training


def launches(
    model: Architecture, name: str, trainings: Sequence[Training], sizes: Sequence[float]
) -> tuple[Launch, ...]:
    """Four ways to launch: one device, one node with DDP, one node and several nodes with sharded weights.

    Without shards the first training that fits is advised, in the smallest of the memories that any of them fits.

    Args:
        model: Sizes of the model.
        name: Name of the model on the command line; a configuration file is replaced by its folder.
        trainings: Memory of each way of training on one device, preferred ones first; sharded runs train as the first.
        sizes: GiB of the devices.
    """
    name = _HUB_IDS.get(name) or (str(Path(name).parent) if name.endswith(".json") else name)
    node = f"torchrun --nproc-per-node {GPUS}"
    nodes = f"torchrun --nnodes {NODES} --nproc-per-node {GPUS} --rdzv-backend c10d --rdzv-endpoint HOST:29500"
    common = f"{_RECIPE} --model {name} --precision {_PRECISIONS[model.dtype]}"
    alone, replica = first_that_fits(trainings, sizes), first_that_fits(list(map(with_buckets, trainings)), sizes)
    first = trainings[0]
    shards = f"{common}{_options(first)} --strategy sharded"
    return (
        Launch("one device", f"python {common}{_options(alone)}", 1, False, alone),
        Launch(f"{GPUS} devices, DDP", f"{node} {common}{_options(replica)}", GPUS, False, replica),
        Launch(f"{GPUS} devices, sharded", f"{node} {shards}", GPUS, True, sharded(model, first, GPUS)),
        Launch(
            f"{NODES} x {GPUS} devices, sharded",
            f"{nodes} {shards}",
            NODES * GPUS,
            True,
            sharded(model, first, NODES * GPUS),
        ),
    )


def first_that_fits(trainings: Sequence[Training], sizes: Sequence[float]) -> Training:
    """The first training that fits the smallest memory that any of them fits; the smallest one if none fits.

    Args:
        trainings: Ways of training, preferred ones first.
        sizes: GiB of the devices.
    """
    fitting = (training for size in sorted(sizes) for training in trainings if training.fits(size))
    return next(fitting, min(trainings, key=lambda training: training.peak))


def _options(training: Training) -> str:
    """The options of the recipe for a training that is not its default."""
    part = "" if training.trained == "experts" else f" --train {training.trained}"
    chosen = training.updates
    return part + (f" --half-precision-updates {chosen}" if chosen == "stochastic_rounding" else "")


def with_buckets(training: Training) -> Training:
    """Memory of each device under DDP."""
    return replace(training, gradients=2 * training.gradients)


def sharded(model: Architecture, training: Training, processes: int) -> Training:
    """Memory of each device with weights, gradients and optimiser states sharded over processes, estimated."""
    size = model.dtype.itemsize
    own = training.gradients // (model.routed if training.trained == "experts" else model.second)
    blocks = [
        block.weights * size + sum(_expert_bytes(experts, training.trained, size, own) for experts in block.experts)
        for block in model.blocks
    ]
    around = training.weights - sum(blocks)
    gradient = max(
        own * sum(_trained(experts, training.trained) for experts in block.experts) for block in model.blocks
    )
    together = around + _BLOCKS_TOGETHER * max(blocks)
    return replace(
        training,
        weights=_share(training.weights, processes),
        gradients=_share(training.gradients, processes),
        optimizer=_share(training.optimizer, processes),
        activations=training.activations + together + _GRADIENTS_TOGETHER * gradient,
        step=_share(training.step, processes),
        curvature=training.curvature + together,
    )


def _expert_bytes(experts: Experts, trained: str, size: int, own: int) -> int:
    in_own = _trained(experts, trained)
    return in_own * own + (experts.parameters - in_own) * size


def _trained(experts: Experts, trained: str) -> int:
    """Number of trained weights of one layer's experts."""
    return experts.parameters if trained == "experts" else experts.layer.num_experts * experts.second


def _share(total: int, processes: int) -> int:
    return -(-total // processes)
