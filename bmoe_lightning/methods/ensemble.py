"""What all ensembles of weights share: one snapshot a member, loaded once a pass over the data."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from torch import Tensor, nn

from bmoe_lightning.methods.method import BatchView, Method
from bmoe_lightning.methods.snapshots import snapshot_shapes, swapped_weights


class WeightEnsemble(Method):
    """Averages the probabilities of a model under several sets of weights.

    Args:
        paths: snapshots, from `save_snapshot`.
        include_current: whether the weights that the model has anyway are one more member.

    Raises:
        FileNotFoundError: if a snapshot is missing.
        ValueError: if there is no snapshot, a path is given twice, a file is no snapshot, or the snapshots hold
            different tensors: members would then mix weights of different runs.
    """

    is_ensemble = True

    def __init__(self, paths: Sequence[str | Path], *, include_current: bool = False) -> None:
        self.paths = tuple(Path(path) for path in paths)
        self.include_current = include_current
        if not self.paths:
            raise ValueError(f"{self.name} needs snapshots of the trained weights, and none were given")
        if len(set(self.paths)) < len(self.paths):
            raise ValueError(f"{self.name} was given the same snapshot twice: {[str(path) for path in self.paths]}")
        shapes = [snapshot_shapes(path) for path in self.paths]
        for path, other in zip(self.paths, shapes, strict=True):
            if other != shapes[0]:
                raise ValueError(
                    f"the snapshots {self.paths[0]} and {path} hold different tensors; take them from runs that train "
                    "the same parameters of the same model"
                )

    def log_probs(self, view: BatchView) -> Tensor:
        """Log-probabilities of one batch under the current member: `[B, K]` float64, `-inf` for absent classes."""
        return view.logits.log_softmax(-1)

    def members(self, model: nn.Module) -> Sequence[AbstractContextManager[None]]:
        """One context a member, which puts its weights in and takes them out again."""
        current = [nullcontext()] if self.include_current else []
        return [*current, *(swapped_weights(model, path) for path in self.paths)]

    def hyperparameters(self) -> dict[str, float]:
        """Number of members."""
        return {"members": len(self.paths) + self.include_current}
