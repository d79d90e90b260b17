"""The search for the fit to a model's weights, among the folders in which it may be."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from bmoe_lightning.experts.weight_comparison import PresentWeights
from bmoe_lightning.laplace.posterior import WeightMismatchError
from bmoe_lightning.methods.fit_index import has_fit, unreadable
from bmoe_lightning.methods.fit_result import FitResult
from bmoe_lightning.methods.storage import load_identity
from bmoe_lightning.trainer.earlier_run import has_stored_sums
from bmoe_lightning.trainer.folders import versions_with_fit
from bmoe_lightning.utils.distributed import gather_number, together
from bmoe_lightning.utils.messages import shown_path

_MAX_NAMED = 10
_REMEDY = "run trainer.fit with this callback, call fit_posterior, or pass dirpath= with the folder of an earlier run."

_REMEDY_OF_STOPPED = (
    "the sums of a curvature pass that was stopped are stored in {}: call fit_posterior(trainer=..., ckpt_path=...) or "
    "trainer.fit(..., ckpt_path=...) with the last checkpoint, which resume from them."
)


@dataclass(frozen=True)
class Search:
    """The result of a search.

    Attributes:
        folder: Folder of the first fit to the model's weights; None if there is none.
        refused: Why each of the other folders before it was refused, for folders that have a fit or cannot be read.
        looked: All folders.
    """

    folder: Path | None
    refused: dict[Path, Exception]
    looked: tuple[Path, ...]

    def error(self) -> Exception:
        """The error that says why there is no fit: which folders were searched, and why each was refused."""
        if not self.refused:
            stopped = [folder for folder in self.looked if has_stored_sums(folder)]
            remedy = _REMEDY if not stopped else _REMEDY_OF_STOPPED.format(shown_path(stopped[0]))
            return RuntimeError(f"no fit was found in {_listed(self.looked)}; {remedy}")
        if len(self.refused) == 1:
            return next(iter(self.refused.values()))
        return WeightMismatchError(
            f"none of {len(self.refused)} folders has a fit to the model's weights; {self.reasons()} Load the "
            f"checkpoint that one of them was fitted to, or {_REMEDY}"
        )

    def has_unreadable(self, folders: Iterable[Path]) -> bool:
        """Whether the fit in one of some folders could not be read; one to other weights could."""
        refused = (self.refused.get(folder) for folder in folders)
        return any(error is not None and not isinstance(error, WeightMismatchError) for error in refused)

    def reasons(self) -> str:
        """Why the folders were refused, in sentences."""
        reasons = [str(error) for error in self.refused.values()]
        more = [f"So are {len(reasons) - _MAX_NAMED} more folders."] if len(reasons) > _MAX_NAMED else []
        return " ".join([*reasons[:_MAX_NAMED], *more])


def _listed(folders: Sequence[Path]) -> str:
    more = [f"{len(folders) - _MAX_NAMED} more folders"] if len(folders) > _MAX_NAMED else []
    return ", ".join([*map(shown_path, folders[:_MAX_NAMED]), *more]) or "any folder"


def places_of_fit(
    given: Path | None, homes: Sequence[Path], default: Path | None, others: Callable[[], Sequence[Path]]
) -> tuple[list[Path], list[Path]]:
    """Folders that may have a fit: those that the user or the checkpoint names, and others.

    Args:
        given: Folder that the user specified; if it has a fit, no other is searched.
        homes: Folders that may be that of the checkpoint's run.
        default: Default folder of the run, or None.
        others: Function that returns the folders of other runs.
    """
    if given is not None and (has_fit(given) or unreadable(given)):
        return [given], []
    if given is not None or default is None:
        return [*([] if given is None else [given]), *homes], []
    return list(homes), [*(versions_with_fit(default) or [default]), *others()]


def find_fit(folders: Sequence[Path], model: nn.Module, *, distributed: bool = False) -> Search:
    """Search for a fit to exactly the weights of a model.

    Args:
        folders: Folders in which it may be, the likeliest first.
        model: The model.
        distributed: Whether all ranks of torch.distributed's default group call this.

    Raises:
        ValueError: If ranks do not see the same fits.
    """
    folders = list(dict.fromkeys(folders))
    known = together(lambda: [_identity(folder) for folder in folders], distributed=distributed)
    if distributed:
        _check_same(known, folders)
    present = PresentWeights(model)
    refused: dict[Path, Exception] = {}
    for folder, found in zip(folders, known, strict=True):
        if isinstance(found, FitResult):
            error = _mismatch(folder, found, present)
            if error is None:
                return Search(folder, refused, tuple(folders))
            refused[folder] = error
        elif found is not None:
            refused[folder] = found
    return Search(None, refused, tuple(folders))


def _mismatch(folder: Path, fit: FitResult, present: PresentWeights) -> Exception | None:
    try:
        found = fit.compared(present)
    except ValueError as error:
        return WeightMismatchError(f"{folder} has the fit of another model than this one: {error}.")
    if found.same:
        return None
    return WeightMismatchError(
        f"{folder} has a fit to other weights than the model has{found.reason()}. Load the checkpoint it was fitted "
        "to, or fit again (trainer.test() without a model loads the best checkpoint, not the last)."
    )


def _identity(folder: Path) -> FitResult | Exception | None:
    """The fit in a folder without its methods, the error that says why it cannot be read, or None if there is none."""
    try:
        return unreadable(folder) or (load_identity(folder) if has_fit(folder) else None)
    except (OSError, ValueError) as error:
        return error


def _check_same(known: Sequence[FitResult | Exception | None], folders: Sequence[Path]) -> None:
    """Check that all ranks find the same fits. A collective."""
    ids = [found.fit_id if isinstance(found, FitResult) else "" for found in known]
    if len(set(gather_number(zlib.crc32("|".join(ids).encode())))) > 1:
        raise ValueError(
            f"ranks find different fits in {', '.join(map(str, folders))}, or some find none. Pass dirpath= with a "
            "folder that all machines share."
        )
