"""Gradients of expert layers that are consumed during the backward pass, layer by layer, and not stored."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge


class Output:
    """The graph node of a part of a layer's output, without its values.

    With gradient checkpointing nothing else stores the values, so they must not be kept alive here.

    Args:
        values: Outputs `[s, d_out]`, with graph.
        num_calls: Number of calls of sharded modules that ended before; see `BackwardPasses`.
    """

    def __init__(self, values: Tensor, num_calls: int = 0) -> None:
        self.num_calls = num_calls
        self.is_leaf = values.is_leaf
        # A leaf has no gradient edge without its tensor.
        self.target: Tensor | GradientEdge = values if values.is_leaf else get_gradient_edge(values)
        self._shape, self.dtype, self._device = values.shape, values.dtype, values.device
        # The graph references the relay, so the relay must not reference the graph.
        self.relay = _Relay()
        values.register_hook(self.relay)

    def zeros(self) -> Tensor:
        """A gradient of zeros."""
        return torch.zeros(self._shape, dtype=self.dtype, device=self._device)


class _Relay:
    """A tensor hook that forwards the gradient to a listener."""

    def __init__(self) -> None:
        self.listener: Callable[[Tensor], None] | None = None

    def __call__(self, gradient: Tensor) -> None:
        if self.listener is not None:
            self.listener(gradient)

    def silence(self) -> None:
        self.listener = None


class Collector:
    """Collects the gradients of all parts of one layer in a backward pass, and passes them to a function together.

    Args:
        position: Position of the layer, the function's first argument.
        outputs: Outputs of the layer; several where experts are separate modules or are called repeatedly.
        consume: Function of the position and the concatenated gradients of all outputs.
    """

    def __init__(self, position: int, outputs: Sequence[Output], consume: Callable[[int, Tensor], None]) -> None:
        self.position = position
        self._outputs = outputs
        self._parts: list[Tensor | None] = [None] * len(outputs)
        self._waiting = len(outputs)
        self._consume = consume
        self._consumed = False

    def listen(self, stack: ExitStack) -> None:
        """Receive gradients of backward passes until the stack is closed."""
        for index, output in enumerate(self._outputs):
            output.relay.listener = functools.partial(self._take, index)
            stack.callback(output.relay.silence)

    def _take(self, index: int, gradient: Tensor) -> None:
        self._parts[index] = gradient.detach()
        self._waiting -= 1
        if not self._waiting:
            self._hand_over()

    def missing(self) -> list[Output]:
        """The outputs that the backward pass did not reach."""
        return [output for part, output in zip(self._parts, self._outputs, strict=False) if part is None]

    def finish(self, gradients: Iterator[Tensor | None], empty: Callable[[int], Tensor]) -> None:
        """Consume the layer with the gradients of `missing` (None is zero), or with `empty` if it has no slots."""
        if self._consumed:
            return
        for index, (part, output) in enumerate(zip(self._parts, self._outputs, strict=True)):
            if part is None:
                gradient = next(gradients)
                self._parts[index] = output.zeros() if gradient is None else gradient
        if not self._parts:
            self._parts = [empty(self.position)]
        self._hand_over()

    def _hand_over(self) -> None:
        parts = [part for part in self._parts if part is not None]
        self._parts, self._consumed = [], True
        with torch.no_grad():
            self._consume(self.position, joined(parts))


def differentiated(logits: Tensor, weights: Tensor, outputs: Sequence[Output]) -> tuple[Tensor | None, ...]:
    """Gradients of weighted logits `[B, K]` with respect to some outputs, None for zero; the graph is retained."""
    targets: Any = [output.target for output in outputs]
    # In this thread, whatever the device: activations that are recomputed must be tapped, and other threads' are not.
    with torch.autograd.set_multithreading_enabled(False):
        return torch.autograd.grad(logits, targets, weights, retain_graph=True, allow_unused=True)


def joined(parts: list[Tensor]) -> Tensor:
    """The concatenation of parts; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)
