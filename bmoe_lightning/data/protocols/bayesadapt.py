"""The protocol of the Bayesian Adaptation Gym (https://arxiv.org/abs/2606.22188, SRI-CSL/BayesAdapt on GitHub)."""

from __future__ import annotations

from dataclasses import dataclass

from bmoe_lightning.data.protocols.base import HeldOutShare, Parts, Protocol, Remainder
from bmoe_lightning.data.tasks.base import Task


@dataclass(frozen=True)
class BayesAdapt(Protocol):
    """The test split is reported, and the validation split calibrates.

    Winogrande, whose validation split is reported, is calibrated on the items of its largest training set that the next
    smaller one does not have. For other tasks without a test split it names no calibration questions; a share of train
    is set aside.

    Attributes:
        fraction: Share of train that is set aside for tasks without further labelled questions.
    """

    name: str = "bayesadapt"
    label: str = "Bayesian Adaptation Gym"
    url: str = "https://arxiv.org/abs/2606.22188"
    fraction: float = 0.2

    def parts(self, task: Task) -> Parts:
        """The parts of a task; `Protocol.parts` describes the arguments."""
        if task.name == "winogrande":
            return Parts(Remainder("winogrande_xl", without="winogrande_l"), "test")
        if not task.validation_splits:
            return Parts(HeldOutShare(self.fraction), "test")
        return Parts("validation", "test")
