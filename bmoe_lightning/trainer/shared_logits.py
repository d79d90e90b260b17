"""Logits that a step of a module takes from the callback's prediction of the same batch, which saves a forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

Use = Callable[[Tensor, Tensor], None]
"""What a step does with logits `[B, K]` and labels `[B]` once there are any."""


class SharedLogits:
    """Logits of the batch that a step is called with, if a prediction of the same batch follows the step.

    The callback announces each batch before the step, which asks for its logits instead of computing them, and gives
    them after its prediction. A step that is called with another batch computes its own. So should one that is called
    by a step of a subclass, which may change inputs or weights around it.
    """

    def __init__(self) -> None:
        self._announced: Any = None
        self._uses: list[Use] = []

    def announce(self, batch: Any) -> None:
        """Announce the logits of a batch."""
        self._announced = batch
        self._uses = []

    def ask(self, batch: Any, use: Use) -> bool:
        """Ask for logits: whether `use` will be called with those of this batch."""
        if self._announced is None or self._announced is not batch:
            return False
        self._uses.append(use)
        return True

    def give(self, logits: Tensor, labels: Tensor) -> None:
        """Give the announced logits to those that asked for them, once."""
        uses = self._uses
        self.withdraw()
        for use in uses:
            use(logits, labels)

    def withdraw(self) -> None:
        """Forget what was announced and asked for."""
        self._announced = None
        self._uses = []


def shared_logits(module: nn.Module) -> SharedLogits | None:
    """What a module's steps ask for logits; None for a module whose steps compute their own."""
    found = getattr(module, "shared_logits", None)
    return found if isinstance(found, SharedLogits) else None
