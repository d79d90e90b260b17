"""A protocol for data sets that are only tested on, and may have no training split."""

from __future__ import annotations

from dataclasses import dataclass

from bmoe_lightning.data.protocols import HeldOutShare, Parts, Protocol
from bmoe_lightning.data.tasks import Task


@dataclass(frozen=True)
class EvaluatedOnly(Protocol):
    """The test split is reported; the validation split stands for the others, of which nothing is used."""

    name: str = "evaluated_only"
    label: str = "Test split alone"

    def parts(self, task: Task) -> Parts:  # noqa: ARG002  # the same for all
        """The parts of a task; `Protocol.parts` describes the arguments."""
        return Parts(HeldOutShare(0.5), "test", train="validation")
