"""Checkpoint ensemble (Chen et al. 2017): the last snapshots of one training run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bmoe_lightning.methods.ensemble import WeightEnsemble


class CheckpointEnsemble(WeightEnsemble):
    """Averages the probabilities of the last snapshots of one run.

    Args:
        paths: the snapshots, from `save_snapshot`.
        include_current: whether the model's own weights are one more member. By default they are not: the last snapshot
            usually holds them.

    Raises:
        FileNotFoundError: as in `WeightEnsemble`.
        ValueError: as in `WeightEnsemble`.
    """

    name = "checkpoint_ensemble"
    label = "Checkpoint ensemble"

    def __init__(self, paths: Sequence[str | Path], *, include_current: bool = False) -> None:
        super().__init__(paths, include_current=include_current)
