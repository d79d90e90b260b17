"""Gradients of expert layers that are handed over during the backward pass, layer by layer, and not kept."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from bmoe_lightning.experts.layer import ExpertLayer


class Collector:
    """Waits during a backward pass for the gradients of all parts of one layer, and hands them over.

    Args:
        position: of the layer; handed over too.
        outputs: its parts, each `[s, d_out]`; several where experts are separate modules or are called repeatedly.
        consume: takes the position and the gradients of all parts, one after the other.
    """

    def __init__(self, position: int, outputs: Sequence[Tensor], consume: Callable[[int, Tensor], None]) -> None:
        self.position = position
        self._outputs = outputs
        self._parts: list[Tensor | None] = [None] * len(outputs)
        self._waiting = len(outputs)
        self._consume = consume
        self._consumed = False

    def listen(self, stack: ExitStack) -> None:
        """Listen to backward passes until the stack is closed."""
        for index, output in enumerate(self._outputs):
            stack.callback(output.register_hook(functools.partial(self._take, index)).remove)

    def _take(self, index: int, gradient: Tensor) -> None:
        self._parts[index] = gradient.detach()
        self._waiting -= 1
        if not self._waiting:
            self._hand_over()

    def missing(self) -> list[Tensor]:
        """The outputs that the backward pass did not come by."""
        return [output for part, output in zip(self._parts, self._outputs, strict=False) if part is None]

    def finish(self, gradients: Iterator[Tensor | None], layer: ExpertLayer, like: Tensor) -> None:
        """Fill in the gradients of `missing`, None for zero, and hand the layer over."""
        if self._consumed:
            return
        for index, (part, output) in enumerate(zip(self._parts, self._outputs, strict=True)):
            if part is None:
                gradient = next(gradients)
                self._parts[index] = torch.zeros_like(output) if gradient is None else gradient
        if not self._parts:
            self._parts = [like.new_empty(0, layer.d_out)]
        self._hand_over()

    def _hand_over(self) -> None:
        parts = [part for part in self._parts if part is not None]
        self._parts, self._consumed = [], True
        with torch.no_grad():
            self._consume(self.position, joined(parts))


def joined(parts: list[Tensor]) -> Tensor:
    """Parts one after the other; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)
