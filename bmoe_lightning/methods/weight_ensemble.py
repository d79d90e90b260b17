"""Base of weight ensembles: one snapshot per member, loaded once per pass over the data."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from torch import Tensor, nn

from bmoe_lightning.methods.base import Method, State
from bmoe_lightning.methods.batch_view import BatchView
from bmoe_lightning.methods.snapshots import snapshot_info, swapped_weights


class WeightEnsemble(Method):
    """Averages the probabilities of a model under several sets of weights, which a subclass specifies."""

    def log_probs(self, batch: BatchView, state: State) -> Tensor:
        return batch.logits.log_softmax(-1)


def weight_members(
    name: str, model: nn.Module, paths: Sequence[Path], *, include_current: bool
) -> list[AbstractContextManager[None]]:
    """One context manager per member, which swaps its weights into the model.

    Args:
        name: Name of the method, for messages.
        model: The model.
        paths: Snapshot files from `save_snapshot`.
        include_current: Whether the current weights of the model are another member.

    Raises:
        FileNotFoundError, ValueError: See `check_alike`.
    """
    check_alike(name, paths)
    current = [nullcontext()] if include_current else []
    return [*current, *(swapped_weights(model, path) for path in paths)]


def check_alike(name: str, paths: Sequence[Path]) -> None:
    """Check that snapshots are of the same tensors.

    Args:
        name: Name of the method, for messages.
        paths: Snapshot files from `save_snapshot`.

    Raises:
        FileNotFoundError: If a snapshot is missing.
        ValueError: If there is no snapshot, a path is given twice, a file is not a snapshot, or the snapshots contain
            different tensors, in which case members would mix weights of different runs.
    """
    if not paths:
        raise ValueError(f"{name} needs snapshots of the trained weights, and there are none; pass at least one")
    if len(set(paths)) < len(paths):
        raise ValueError(f"{name} was given the same snapshot twice: {[str(path) for path in paths]}")
    shapes = [snapshot_info(path).shapes for path in paths]
    for path, other in zip(paths, shapes, strict=True):
        if other != shapes[0]:
            raise ValueError(
                f"the snapshots {paths[0]} and {path} contain different tensors; use runs that train the same "
                "parameters of the same model"
            )
