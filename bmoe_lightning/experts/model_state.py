"""The state of a model while its slots are recorded: evaluation mode, frozen parameters."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_map_only

from bmoe_lightning.experts.fsdp import reshard
from bmoe_lightning.experts.module_tree import all_modules, own_parameters
from bmoe_lightning.experts.threads import model_lock


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Set a model to evaluation mode; the mode of every module is restored afterwards.

    The model's lock is held meanwhile: another thread that predicts would restore the modes too early.
    """
    with model_lock(model):
        modes = [(module, module.training) for module in all_modules(model)]
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

    A forward or backward pass of another thread would get no gradients, or partial ones. So the backward pass is
    refused if a module with such parameters was called meanwhile, or if it reaches one of them meanwhile.
    """
    reshard(model)
    modules = all_modules(model)
    owned = [(module, [p for p in own_parameters(module) if p.requires_grad]) for module in modules]
    trained = [parameter for _, parameters in owned for parameter in parameters]
    thread = threading.get_ident()
    detach, mark = functools.partial(_detached, thread), functools.partial(_marked, thread)
    handles: list[Any] = []  # an ExitStack's callbacks would take longer than all else
    try:
        for parameter in trained:
            if type(parameter) is nn.Parameter:  # and not a sharded one, which no other thread may use meanwhile
                # Its node alone, which a graph of another thread shares; a hook of the parameter would leave traces.
                handles.append(get_gradient_edge(parameter).node.register_prehook(_refuse_accumulation))
        for module, parameters in owned:
            # Hooks of gradient checkpointing and PEFT make embeddings require gradients: a graph would start there.
            if isinstance(module, nn.Embedding):
                handles.append(module.register_forward_hook(detach))
            if parameters and not isinstance(module, torch.jit.ScriptModule):
                handles.append(module.register_forward_hook(mark))
        # The hooks are there for as long as the flags differ, or longer.
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        reshard(model)  # unsharded weights hold a copy of the flag
        for parameter in trained:
            parameter.requires_grad_(True)
        for handle in handles:
            handle.remove()


def _detached(thread: int, _module: nn.Module, _inputs: Any, output: Any) -> Any:
    if threading.get_ident() == thread and isinstance(output, Tensor) and output.is_leaf:
        return output.detach()
    return None


def _marked(thread: int, _module: nn.Module, _inputs: Any, output: Any) -> Any:
    if threading.get_ident() == thread or not torch.is_grad_enabled():
        return None
    return tree_map_only(Tensor, _without_backward, output)


def _without_backward(output: Tensor) -> Tensor:
    if not output.is_floating_point() or output.is_inference():
        return output
    if not output.requires_grad:
        # A copy of a leaf, since a leaf that requires gradients cannot be modified in place.
        output = output.detach().requires_grad_().clone()
    output.register_hook(_refuse_backward)
    return output


def _refuse_accumulation(_gradients: Any) -> NoReturn:
    raise RuntimeError(
        "a backward pass through the model ran while another thread predicted with it, when its parameters require no "
        "gradients, so these gradients would be partial; hold bmoe_lightning.experts.model_lock(model) during each "
        "training step"
    )


def _refuse_backward(_gradient: Tensor) -> NoReturn:
    raise RuntimeError(
        "the model ran forward while another thread predicted with it, when its parameters require no gradients, so "
        "these gradients would be partial; hold bmoe_lightning.experts.model_lock(model) during each training step"
    )
