"""The state of a model while its slots are recorded: evaluation mode, frozen parameters."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from bmoe_lightning.experts.fsdp import reshard
from bmoe_lightning.experts.threads import model_lock


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Set a model to evaluation mode; the mode of every module is restored afterwards.

    The model's lock is held meanwhile: another thread that predicts would restore the modes too early.
    """
    with model_lock(model):
        modes = [(module, module.training) for module in model.modules()]
        if any(training for _, training in modes):
            model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                if module.training != training:
                    module.training = training


@contextmanager
def frozen_parameters(model: nn.Module) -> Iterator[None]:
    """Let no parameter of a model require gradients, nor the outputs of embeddings; restored afterwards.

    A forward pass of another thread would get no gradients, or partial ones, so its backward pass is refused.
    """
    reshard(model)
    modules = list(model.modules())
    trained = [p for module in modules for p in module.parameters(recurse=False) if p.requires_grad]
    hook = functools.partial(_detached, threading.get_ident(), bool(trained))
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        with ExitStack() as stack:
            for module in modules:
                # Hooks of gradient checkpointing and PEFT make embeddings require gradients: a graph would start there.
                if isinstance(module, nn.Embedding):
                    stack.callback(module.register_forward_hook(hook).remove)
            yield
    finally:
        reshard(model)  # unsharded weights hold a copy of the flag
        for parameter in trained:
            parameter.requires_grad_(True)


def _detached(thread: int, trains: bool, _module: nn.Module, _inputs: Any, output: Any) -> Any:
    if not isinstance(output, Tensor):
        return output
    if threading.get_ident() == thread:
        return output.detach() if output.is_leaf else output
    if trains and torch.is_grad_enabled() and not output.is_inference():
        output = output if output.requires_grad else output.detach().requires_grad_()
        output.register_hook(_refuse_backward)
    return output


def _refuse_backward(_gradient: Tensor) -> NoReturn:
    raise RuntimeError(
        "the model ran forward while another thread predicted with it, when its parameters require no gradients, so "
        "these gradients would be partial; hold bmoe_lightning.experts.model_lock(model) during each training step"
    )
