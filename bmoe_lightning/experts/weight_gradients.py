"""Squared norms of the gradients of weights, without storing the gradients."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def squared_gradients(outputs: Tensor, weights: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """The squared norms of the gradients of weighted outputs with respect to some parameters.

    Each gradient is reduced to its norm, in float32 or wider, as soon as the backward pass has computed it, so that the
    memory is that of the largest one. `.grad` is left alone, and hooks that act after its accumulation, as those of
    DistributedDataParallel, do not run. The graph is retained.

    Args:
        outputs: Outputs, with graph, of any shape.
        weights: Weight of each output in the sum that is differentiated, of the same shape.
        parameters: Leaves that require gradients, on one device or several.

    Returns:
        `[len(parameters)]` float64 on the CPU; 0 for a parameter that no output depends on.
    """
    found: dict[int, Tensor] = {}
    with _squares_collected(parameters, found), torch.autograd.set_multithreading_enabled(False):
        torch.autograd.grad(outputs, list(parameters), weights.to(outputs), retain_graph=True, allow_unused=True)
    zero = torch.zeros((), dtype=torch.float64)
    return torch.stack([found.get(position, zero).cpu() for position in range(len(parameters))])


@contextmanager
def _squares_collected(parameters: Sequence[nn.Parameter], found: dict[int, Tensor]) -> Iterator[None]:
    """Put squared norms into `found` in this thread's backward passes, in place of the parameters' own hooks."""
    thread = threading.get_ident()

    def collect(position: int, gradient: Tensor) -> Tensor | None:
        if threading.get_ident() != thread:
            return None
        found[position] = _squared_norm(gradient.detach())
        # In place of the gradient, which `torch.autograd.grad` would hold until the end of the pass.
        return None if gradient.is_sparse else gradient.new_zeros(()).expand_as(gradient)

    hooks = [parameter._backward_hooks for parameter in parameters]
    handles = []
    try:
        for position, parameter in enumerate(parameters):
            parameter._backward_hooks = None  # those of a user, which may count or clip
            handles.append(parameter.register_hook(lambda gradient, position=position: collect(position, gradient)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, before in zip(parameters, hooks, strict=True):
            parameter._backward_hooks = before


def _squared_norm(gradient: Tensor) -> Tensor:
    values = gradient.coalesce().values() if gradient.is_sparse else gradient
    if not values.numel():
        return torch.zeros((), dtype=torch.float64)
    rows = values.reshape(len(values), -1) if values.dim() else values.view(1, 1)
    dtype = torch.promote_types(values.dtype, torch.float32)
    return torch.linalg.vector_norm(rows, dim=1, dtype=dtype).double().square().sum()
