"""Checkpoint ensemble: the last snapshots of one training run."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from bmoe_lightning.methods.base import State, scalar
from bmoe_lightning.methods.needs import Needs
from bmoe_lightning.methods.options import option
from bmoe_lightning.methods.weight_ensemble import WeightEnsemble, weight_members
from bmoe_lightning.methods.workbench import Workbench


@dataclass(frozen=True)
class CheckpointEnsemble(WeightEnsemble):
    """Averages the probabilities of the weights after the last epochs of one run.

    Chen, Lundberg and Lee 2017, Checkpoint Ensembles: Ensemble Methods from a Single Training Process.

    Raises:
        ValueError: If `num_snapshots` is below 2.
    """

    name: str = "checkpoint_ensemble"
    label: str = "Checkpoint ensemble"
    num_snapshots: int = option(5, "Number of members: the weights after each of the last epochs.")

    positive_state = ("members",)
    source = "https://arxiv.org/abs/1710.03282"
    cost = "one forward pass per member"

    def __post_init__(self) -> None:
        if self.num_snapshots < 2:
            raise ValueError(
                f"a checkpoint ensemble needs at least 2 snapshots, got num_snapshots={self.num_snapshots}"
            )

    @property
    def needs(self) -> Needs:
        return Needs(snapshots=2, max_snapshots=self.num_snapshots)

    def fit(self, work: Workbench) -> State:
        return {"members": scalar(len(work.snapshots[-self.num_snapshots :]))}  # fewer if the run was short

    def members(
        self, model: nn.Module, state: State, snapshots: Sequence[Path]
    ) -> Sequence[AbstractContextManager[None]]:
        return weight_members(self.name, model, snapshots[-self.num_snapshots :], include_current=False)
