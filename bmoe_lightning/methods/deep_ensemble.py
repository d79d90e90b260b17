"""Deep ensemble (Lakshminarayanan et al. 2017): the final weights of runs that differ in their seed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bmoe_lightning.methods.ensemble import WeightEnsemble


class DeepEnsemble(WeightEnsemble):
    """Averages the probabilities of the final weights of several runs.

    Runs that start from the same pre-trained weights differ in the order of their data and in dropout alone, so their
    members are more alike than those of an ensemble trained from scratch.

    Args:
        paths: snapshots of the other runs' final weights, from `save_snapshot`.
        include_current: whether the model's own weights are one more member. False if `paths` holds them as well.

    Raises:
        FileNotFoundError: as in `WeightEnsemble`.
        ValueError: as in `WeightEnsemble`.
    """

    name = "deep_ensemble"
    label = "Deep ensemble"

    def __init__(self, paths: Sequence[str | Path], *, include_current: bool = True) -> None:
        super().__init__(paths, include_current=include_current)
