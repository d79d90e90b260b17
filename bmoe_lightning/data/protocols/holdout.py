"""The default: the validation split calibrates, and the test split is reported."""

from __future__ import annotations

from dataclasses import dataclass

from bmoe_lightning.data.protocols.base import HeldOutShare, Parts, Protocol
from bmoe_lightning.data.tasks.base import Task


@dataclass(frozen=True)
class Holdout(Protocol):
    """The validation split calibrates, or a share of train where the data have none; the test split is reported.

    Attributes:
        fraction: Share of train that is set aside where there is no validation split.
    """

    name: str = "holdout"
    label: str = "Validation split"
    fraction: float = 0.2

    def parts(self, task: Task) -> Parts:  # noqa: ARG002  # the same for all
        """The parts of a task; `Protocol.parts` describes the arguments."""
        return Parts("validation", "test", otherwise=HeldOutShare(self.fraction))
