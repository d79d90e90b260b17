"""How a run of the main job is launched on one device and on several, and what each of them has to hold.

With DDP every device holds the whole model, and the gradients once more in the buckets that are sent. Sharded (FSDP2)
it holds a shard of weights, gradients and optimiser states, and for a while what is all-gathered: the weights around
the blocks during a whole step, and those of three blocks (the one that runs, the next one on its way, and the buffer
that it comes in) with the gradients of two, before they are reduce-scattered.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from recipes.plan.architecture import Architecture, Experts
from recipes.plan.memory import Training

GPUS = 8
NODES = 2
_RECIPE = "-m recipes.qwen_obqa"
_HUB_IDS = {"qwen1.5-moe-a2.7b": "Qwen/Qwen1.5-MoE-A2.7B", "deepseek-moe-16b": "deepseek-ai/deepseek-moe-16b-base"}
# So many blocks have unsharded weights, or unsharded gradients, at once.
_BLOCKS_TOGETHER = 3
_GRADIENTS_TOGETHER = 2


@dataclass(frozen=True)
class Launch:
    """One way to launch a run.

    Attributes:
        name: Name for people.
        command: Command line to type, on each of the nodes.
        processes: Number of processes, one a device.
        sharded: Whether weights are sharded over the devices.
        training: Memory of each device.
    """

    name: str
    command: str
    processes: int
    sharded: bool
    training: Training


def launches(model: Architecture, name: str, down_proj: Training, experts: Training) -> tuple[Launch, ...]:
    """The four ways: one device, a node with DDP, a node and several nodes with sharded weights.

    Args:
        model: Model without its weights.
        name: Name of the model on the command line; a configuration file stands for its folder with weights.
        down_proj: Memory of training `down_proj` on one device.
        experts: Memory of training all experts on one device.
    """
    name = _HUB_IDS.get(name) or (str(Path(name).parent) if name.endswith(".json") else name)
    node = f"torchrun --nproc-per-node {GPUS}"
    nodes = f"torchrun --nnodes {NODES} --nproc-per-node {GPUS} --rdzv-backend c10d --rdzv-endpoint HOST:29500"
    small, large = f"{_RECIPE} --model {name} --train down_proj", f"{_RECIPE} --model {name}"
    return (
        Launch("one device", f"python {small}", 1, False, down_proj),
        Launch(f"{GPUS} devices, DDP", f"{node} {small}", GPUS, False, with_buckets(down_proj)),
        Launch(
            f"{GPUS} devices, sharded", f"{node} {large} --strategy sharded", GPUS, True, sharded(model, experts, GPUS)
        ),
        Launch(
            f"{NODES} x {GPUS} devices, sharded",
            f"{nodes} {large} --strategy sharded",
            NODES * GPUS,
            True,
            sharded(model, experts, NODES * GPUS),
        ),
    )


def with_buckets(training: Training) -> Training:
    """A device's memory under DDP."""
    return replace(training, gradients=2 * training.gradients)


def sharded(model: Architecture, training: Training, processes: int) -> Training:
    """A device's memory where weights, gradients and optimiser states are sharded over processes; estimated."""
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
    """Trained weights of one layer's experts."""
    return experts.parameters if trained == "experts" else experts.layer.num_experts * experts.second


def _share(total: int, processes: int) -> int:
    return -(-total // processes)
