"""Deep ensemble: the final weights of runs with different seeds."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from bmoe_lightning.methods.base import State
from bmoe_lightning.methods.needs import Needs
from bmoe_lightning.methods.options import option
from bmoe_lightning.methods.weight_ensemble import WeightEnsemble, weight_members


@dataclass(frozen=True)
class DeepEnsemble(WeightEnsemble):
    """Averages the probabilities of the final weights of several runs, including this one.

    Runs that start from the same pretrained weights differ only in the order of their data and in dropout, so their
    members are more alike than those of an ensemble trained from scratch. Lakshminarayanan, Pritzel and Blundell 2017,
    Simple and Scalable Predictive Uncertainty Estimation using Deep Ensembles.

    Raises:
        ValueError: If `size` is below 2.
    """

    name: str = "deep_ensemble"
    label: str = "Deep ensemble"
    size: int = option(
        3, "Number of members, including this run; where `runs` are given, one more than these.", trial=2
    )
    runs: tuple[str, ...] = option(
        (),
        "Snapshot files with the final weights of the other runs; recipes train these runs and set this.",
        prediction_only=True,
    )

    source = "https://arxiv.org/abs/1612.01474"
    cost = "one forward pass per member"

    def __post_init__(self) -> None:
        object.__setattr__(self, "runs", tuple(map(str, self.runs)))
        if self.size < 2:
            raise ValueError(f"{self.name} needs at least 2 members, got size={self.size}")

    @property
    def needs(self) -> Needs:
        return Needs(runs=0 if self.runs else self.size - 1)

    def members(
        self, model: nn.Module, state: State, snapshots: Sequence[Path]
    ) -> Sequence[AbstractContextManager[None]]:
        return weight_members(self.name, model, [Path(run) for run in self.runs], include_current=True)

    def hyperparameters(self, state: State) -> dict[str, float]:
        return {"members": len(self.runs) + 1}
