"""The protocol of Bayesian Mixture of Experts (Dialameh et al. 2025, https://arxiv.org/abs/2511.08968)."""

from __future__ import annotations

from dataclasses import dataclass

from bmoe_lightning.data.protocols.base import HeldOutShare, Parts, Protocol, labelled_validation
from bmoe_lightning.data.tasks.base import Task


@dataclass(frozen=True)
class Paper(Protocol):
    """The public validation split is reported, and a fifth of train calibrates.

    It is that of Bayesian LoRA (https://arxiv.org/abs/2308.13111), whose code takes the last fifth of the file; here it
    is a seeded draw, stratified by the answer. Questions with other than four choices, which that code drops, are kept.

    Attributes:
        fraction: Share of train that is set aside.
    """

    name: str = "paper"
    label: str = "Bayesian-MoE"
    url: str = "https://arxiv.org/abs/2511.08968"
    fraction: float = 0.2

    def parts(self, task: Task) -> Parts:
        """The parts of a task; `Protocol.parts` describes the arguments."""
        return Parts(HeldOutShare(self.fraction), labelled_validation(task))
