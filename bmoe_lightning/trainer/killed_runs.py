"""The run that was killed in a folder, and whether a model has its weights, so that its snapshots are the model's."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from bmoe_lightning.laplace.posterior import WeightMismatchError
from bmoe_lightning.methods.fit_index import INDEX_FILE, stored_fit_id
from bmoe_lightning.methods.snapshots import snapshot_info
from bmoe_lightning.trainer.earlier_run import pass_files
from bmoe_lightning.trainer.folders import marked_weights, training_id
from bmoe_lightning.trainer.snapshot_files import latest_snapshots


@dataclass(frozen=True)
class KilledRun:
    """A training run that left files in a folder, without a fit.

    Attributes:
        fit_id: Id of its fit.
        snapshots: Its snapshots, latest last.
        weights: Fingerprint of the weights that it was fitting methods to; empty if it was killed before.
    """

    fit_id: str
    snapshots: tuple[Path, ...]
    weights: str = ""

    def snapshots_for(self, weights: str) -> list[Path] | None:
        """The snapshots of a model with certain weights, up to the epoch that they are from if it is known.

        Args:
            weights: Fingerprint of all weights of the model; see `module_fingerprint`.

        Returns:
            None if they are not known to be of this run: a model that averages the snapshots of another training
            predicts with neither.
        """
        if self.weights == weights:
            return list(self.snapshots)
        same = [index for index, path in enumerate(self.snapshots) if snapshot_info(path).weights == weights]
        return list(self.snapshots[: same[-1] + 1]) if same else None


def killed_run(folder: Path) -> KilledRun | None:
    """The run that left a mark of its training in a folder, or else wrote the latest snapshot there.

    Args:
        folder: Output folder.

    Raises:
        ValueError: If its last snapshot is damaged.
    """
    known = training_id(folder)
    snapshots = latest_snapshots(folder, known or None)
    if not snapshots:
        return KilledRun(known, (), marked_weights(folder)) if known else None
    return KilledRun(snapshot_info(snapshots[-1]).fit, tuple(snapshots), marked_weights(folder))


def ended_without_fit(folders: Iterable[Path], fit_id: str, weights: str) -> bool:
    """Whether no folder has the fit of a run, nor says that the run was fitting methods to other weights.

    Args:
        folders: Folders in which the run may have written.
        fit_id: Id of its fit.
        weights: Fingerprint of all weights of the model.
    """
    places = list(folders)
    if any(stored_fit_id(folder) == fit_id for folder in places):
        return False
    return all(marked_weights(folder) in ("", weights) for folder in places if training_id(folder) == fit_id)


def check_replaceable(folder: Path, weights: str, known: Collection[str], *, resumes_pass: bool) -> None:
    """Check that a run was killed that would have replaced the fit in a folder, and that a model has its weights.

    Args:
        folder: Output folder.
        weights: Fingerprint of all weights of the model.
        known: Ids of the fits whose runs are known to have led to these weights.
        resumes_pass: Whether a killed curvature pass is resumed, which itself refuses other weights.

    Raises:
        WeightMismatchError: If not: the fit is one to other weights than the model's.
    """
    if not _was_replacing(folder, weights, known, resumes_pass=resumes_pass):
        raise WeightMismatchError(
            f"{folder} has a fit to other weights than the model's, which is not overwritten. Load the checkpoint that "
            f"it was fitted to, pass another dirpath=, or remove its {INDEX_FILE}."
        )


def _was_replacing(folder: Path, weights: str, known: Collection[str], *, resumes_pass: bool) -> bool:
    killed = training_id(folder)
    if not killed or killed == stored_fit_id(folder):
        return False
    if killed in known:
        return True
    run = killed_run(folder)
    if run is not None and run.snapshots_for(weights) is not None:
        return True
    return resumes_pass and bool(pass_files(folder, killed))


def run_of_weights(
    folders: Iterable[Path], weights: str, *, uses_snapshots: bool, resumes_pass: bool
) -> tuple[Path, str, list[Path]] | None:
    """The killed run whose weights a model has: its folder, the id of its fit, and the snapshots for the model.

    Args:
        folders: Folders in which runs may have been killed, the likeliest first.
        weights: Fingerprint of all weights of the model.
        uses_snapshots: Whether methods use snapshots.
        resumes_pass: Whether a killed curvature pass is resumed, which itself refuses other weights.

    Returns:
        None if there is none.

    Raises:
        WeightMismatchError: If there is none, but one that left snapshots, and methods use snapshots.
    """
    left: list[Path] = []
    for folder in folders:
        run = killed_run(folder)
        if run is None:
            continue
        snapshots = run.snapshots_for(weights)
        if snapshots is not None:
            return folder, run.fit_id, snapshots
        if uses_snapshots and run.snapshots:
            left.append(folder)
        elif resumes_pass and pass_files(folder, run.fit_id):
            return folder, run.fit_id, []
    if left:
        raise WeightMismatchError(
            f"{left[0]} has snapshots of another training, or of one killed before it had the model's weights. "
            "Pass ckpt_path= with a checkpoint of the training that led to these weights, or remove the methods that "
            "use snapshots."
        )
    return None
