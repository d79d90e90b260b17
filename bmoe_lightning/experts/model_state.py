"""The state of a model while its slots are recorded: evaluation mode, frozen parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from bmoe_lightning.experts.fsdp import reshard
from bmoe_lightning.experts.threads import in_this_thread, model_lock


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Set a model to evaluation mode; the mode of every module is restored afterwards.

    The model's lock is held meanwhile: another thread that predicts would restore the modes too early.
    """
    with model_lock(model):
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


@contextmanager
def frozen_parameters(model: nn.Module) -> Iterator[None]:
    """Let no parameter of a model require gradients, nor the outputs of embeddings; restored afterwards."""
    reshard(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        with ExitStack() as stack:
            for module in model.modules():
                # Hooks of gradient checkpointing and PEFT make embeddings require gradients: a graph would start there.
                if isinstance(module, nn.Embedding):
                    stack.callback(module.register_forward_hook(in_this_thread(_detached)).remove)
            yield
    finally:
        reshard(model)  # unsharded weights hold a copy of the flag
        for parameter in trained:
            parameter.requires_grad_(True)


def _detached(_module: nn.Module, _inputs: Any, output: Any) -> Any:
    return output.detach() if isinstance(output, Tensor) and output.is_leaf else output
