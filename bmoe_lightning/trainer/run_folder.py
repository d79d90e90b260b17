"""The output folder of a callback, and the files of earlier runs in it."""

from __future__ import annotations

import re
import uuid
import warnings
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import lightning as L

from bmoe_lightning.curvature.checkpoint import remove_checkpoint
from bmoe_lightning.experts.fsdp import gathered, reshard
from bmoe_lightning.laplace.posterior import WeightMismatchError
from bmoe_lightning.methods.fit_result import FitResult
from bmoe_lightning.methods.snapshots import remove_snapshot, save_snapshot, snapshot_info
from bmoe_lightning.methods.storage import INDEX_FILE, has_fit, load_fit, save_fit, stored_fit_id, stored_snapshots
from bmoe_lightning.methods.workbench import PassFiles
from bmoe_lightning.trainer.checks import is_trial
from bmoe_lightning.trainer.folders import (
    belongs_to,
    beside_checkpoint,
    claimed_version,
    default_folder,
    mark_training,
    training_id,
    unmark_training,
)
from bmoe_lightning.trainer.snapshot_files import copied, epoch_of, latest_snapshots, new_snapshot, taken_over
from bmoe_lightning.utils.distributed import gather_number, together

T = TypeVar("T")


@dataclass(frozen=True)
class EarlierRun:
    """What a checkpoint says of the run that wrote it.

    Attributes:
        folder: Output folder of that run.
        fit_id: Id of its fit; empty if unknown.
        snapshots: File names of its snapshots, latest last.
    """

    folder: Path
    fit_id: str
    snapshots: tuple[str, ...]


class RunFolder:
    """The output folder of a run, and its snapshots.

    Only files with the id of this run's fit are removed. What rank 0 cannot read or write is raised on all ranks.

    Args:
        given: Folder that the user named, if any.
        pass_every: Batches from one write of a curvature pass's accumulators to the next; None writes none.
        name: Name of the subfolder, which separates two callbacks of one run.

    Attributes:
        given: Folder that the user specified on rank 0, if any.
        folder: Output folder; None writes nothing.
        fit_id: Identifier of this run's fit.
        snapshots: Snapshots of the trained weights after the last epochs, latest last.
        resumes: Whether training resumes the run of a checkpoint.
    """

    def __init__(self, given: str | None, pass_every: int | None, name: str = "") -> None:
        if name and not re.fullmatch(r"[\w.-]*\w", name):
            raise ValueError(
                f"name becomes a folder and a part of logged keys; use letters, digits, '.', '_' and '-', got {name!r}"
            )
        if re.search(r"-v\d+$", name):
            raise ValueError(f"name {name!r} ends like the version of another run's folder; leave out the end '-v...'")
        self.given = Path(given, name) if given is not None else None
        self.folder = self.given
        self.fit_id = uuid.uuid4().hex
        self.snapshots: list[Path] = []
        self._name = name
        self._pass_every = pass_every
        self._earlier: EarlierRun | None = None
        self._checkpoint: Path | None = None
        self._several = False
        self._is_zero = True
        self.resumes = False

    def settle(self, trainer: L.Trainer) -> None:
        """Have all processes write into one folder: the given one, or one in the logger's. A collective."""
        default = default_folder(trainer, self._name)
        # A path with the time in it is another one on each process, and so is a random id.
        self.given, default, self.fit_id = trainer.strategy.broadcast((self.given, default, self.fit_id))
        self.folder = None if is_trial(trainer) else self.given or default
        self._several, self._is_zero = trainer.world_size > 1, trainer.is_global_zero

    def begin_training(self, trainer: L.Trainer, num_snapshots: int = 0) -> None:
        """Adopt the snapshots of a resumed run, or start a new fit. A collective.

        A default folder that another run uses is replaced by its next version.

        Args:
            trainer: Trainer within a fit.
            num_snapshots: Number of snapshots that methods use.

        Raises:
            ValueError: If snapshots of the resumed run are missing that methods will use.
            OSError: If the folder cannot be written to.
        """
        self._checkpoint = _checkpoint_of(trainer)
        earlier = self._earlier if self.resumes else None
        self.fit_id = (earlier.fit_id if earlier is not None else "") or uuid.uuid4().hex
        epochs = trainer.max_epochs
        left = None if epochs is None or epochs < 0 else epochs - trainer.current_epoch

        def begin() -> tuple[Path | None, str, list[Path]]:
            if self.folder is None:
                return None, self.fit_id, []
            folder = self.folder
            if self.given is None:
                folder = claimed_version(folder, self.fit_id)
            else:
                mark_training(folder, self.fit_id)
            self.folder = folder
            self.remove_pass_files()
            return folder, self.fit_id, self._taken_over(folder, earlier, num_snapshots, left)

        self.folder, self.fit_id, self.snapshots = self._from_rank_zero(trainer, begin)
        self.resumes = False

    def continue_training_of(self, trainer: L.Trainer, num_snapshots: int = 0) -> None:
        """Find the snapshots of a training run that ended, or was killed while fitting. A collective.

        Args:
            trainer: Trainer within a fit.
            num_snapshots: Number of snapshots that methods use.

        Raises:
            ValueError: If the checkpoint names snapshots that methods use, and some are missing.
        """
        self._checkpoint = _checkpoint_of(trainer)

        def find() -> tuple[str, list[Path]]:
            self._warn_of_pass_elsewhere()
            if self.snapshots or self.folder is None:
                return self.fit_id, self.snapshots
            if self._earlier is not None and self.resumes and self._earlier.fit_id:
                return self._earlier.fit_id, self._taken_over(self.folder, self._earlier, num_snapshots, 0)
            killed = training_id(self.folder) or None
            snapshots = latest_snapshots(self.folder, killed)
            return snapshot_info(snapshots[-1]).fit if snapshots else killed or self.fit_id, snapshots

        self.fit_id, self.snapshots = self._from_rank_zero(trainer, find)
        self.resumes = False

    def save_snapshot(self, trainer: L.Trainer, module: L.LightningModule, num_snapshots: int) -> None:
        """Write a snapshot of the trained weights, and remove the oldest surplus ones. A collective.

        Raises:
            OSError: If it cannot be written.
        """
        if self.folder is None:
            return
        path = trainer.strategy.broadcast(new_snapshot(self.folder, self.fit_id, trainer.current_epoch))
        reshard(module)
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        gathered_weights = gathered(trained, keep=trainer.is_global_zero)
        before = [earlier for earlier in self.snapshots if epoch_of(earlier) < trainer.current_epoch]
        surplus = before[: max(0, len(before) + 1 - num_snapshots)]

        def write() -> None:
            save_snapshot(path, gathered_weights, fit=self.fit_id)
            # Those of an earlier fit in this folder stay: its checkpoints may be resumed.
            for earlier in set(surplus) - set(stored_snapshots(path.parent.parent)):
                remove_snapshot(earlier)

        self._from_rank_zero(trainer, write)
        self.snapshots = [*before[len(surplus) :], path]

    def save(self, trainer: L.Trainer, fit: FitResult) -> None:
        """Write a fit with the run's snapshots, copied if they are in another folder. A collective.

        Raises:
            OSError: If it cannot be written.
        """
        folder = self.folder
        if folder is None:
            return

        def write() -> list[Path]:
            snapshots = [copied(path, folder) for path in self.snapshots]
            save_fit(folder, fit, snapshots)
            unmark_training(folder, fit.fit_id)
            return snapshots

        self.snapshots = self._from_rank_zero(trainer, write)

    def load(self, trainer: L.Trainer, offload: Collection[str] = ()) -> FitResult | None:
        """Load the fit of an earlier process with its snapshots; None if there is none. A collective.

        It is searched in the given folder, in the one that the loaded checkpoint names, in those beside the
        checkpoint (a run's folder may have been moved), and in the default folder.

        Args:
            trainer: The trainer.
            offload: Digests of the curvatures whose factors are offloaded to the CPU.

        Raises:
            ValueError: If it is damaged, mixes files of two fits, or ranks do not find the same fit.
            FileNotFoundError: If one of its files is missing.
            OSError: If one of its files cannot be read.
        """
        self._checkpoint = _checkpoint_of(trainer)
        folders = [folder for folder in (self.given, *self._homes(), self.folder) if folder is not None]

        def read() -> tuple[FitResult | None, list[Path]]:
            folder = next((folder for folder in folders if has_fit(folder)), None)
            return (None, []) if folder is None else load_fit(folder, offload=offload)

        fit, snapshots = together(read, distributed=self._several)
        if self._several:
            _check_same(fit, folders)
        if fit is not None:
            self.fit_id, self.snapshots = fit.fit_id, snapshots
        return fit

    def set_aside(self) -> None:
        """Ignore a fit to other weights, and its snapshots. A collective.

        A fit that the run of the checkpoint, or of a killed curvature pass, was about to replace is replaced.

        Raises:
            WeightMismatchError: If the new fit would overwrite any other fit.
        """
        folder = self.folder

        def check() -> None:
            if self._is_zero and folder is not None and has_fit(folder) and not self._was_replacing(folder):
                raise WeightMismatchError(
                    f"{folder} has a fit to other weights than the model's, which is not overwritten. Load the "
                    f"checkpoint that it was fitted to, pass another dirpath=, or remove its {INDEX_FILE}."
                )

        together(check, distributed=self._several)
        self.fit_id, self.snapshots = uuid.uuid4().hex, []  # continue_training_of broadcasts rank 0's id

    def pass_files(self) -> PassFiles | None:
        """Location of the checkpoints of curvature passes."""
        if self.folder is None or self._pass_every is None:
            return None
        return PassFiles(self.folder, self._pass_every, self.fit_id)

    def remove_pass_files(self) -> None:
        """Remove the checkpoints of this fit's curvature passes, which are complete or belong to earlier weights."""
        if self.folder is not None:
            for path in _pass_files(self.folder, self.fit_id):
                remove_checkpoint(path)

    def state_dict(self) -> dict[str, Any]:
        """Folder, fit id and snapshot names, for a checkpoint."""
        return {
            "folder": None if self.folder is None else str(self.folder),
            "fit": self.fit_id,
            "snapshots": [path.name for path in self.snapshots],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the folder and fit of a checkpoint's run; what is no id is ignored, since file names contain it."""
        if not isinstance(state_dict, Mapping):
            raise _damaged_state(state_dict)
        if state_dict.get("folder"):
            folder, snapshots = state_dict["folder"], state_dict.get("snapshots", [])
            if not isinstance(folder, str) or not isinstance(snapshots, list | tuple):
                raise _damaged_state(state_dict)
            names = tuple(str(name) for name in snapshots)
            fit_id = str(state_dict.get("fit", ""))
            known = fit_id if re.fullmatch(r"[0-9a-f]{32}", fit_id) else ""
            self._earlier = EarlierRun(Path(folder), known, names)

    def _from_rank_zero(self, trainer: L.Trainer, action: Callable[[], T]) -> T:
        """Call a function on rank 0 and broadcast its result; all ranks raise if it fails. A collective."""
        found = together(lambda: action() if trainer.is_global_zero else None, distributed=trainer.world_size > 1)
        return cast("T", trainer.strategy.broadcast(found))

    def _homes(self) -> list[Path]:
        """Folders that may be the output folder of the loaded checkpoint's run, the likeliest first."""
        earlier = self._earlier
        folder = None if earlier is None else earlier.folder
        found = [] if folder is None else [folder]
        if self._checkpoint is not None:
            found += beside_checkpoint(self._checkpoint, folder, self._name)
        return sorted(found, key=lambda path: earlier is None or not belongs_to(path, earlier.fit_id))

    def _taken_over(self, target: Path, earlier: EarlierRun | None, num_snapshots: int, left: int | None) -> list[Path]:
        """The snapshots of the resumed run; raises `ValueError` if some are missing that methods will use."""
        if earlier is None:
            return []
        home = self._homes()[0]
        found, missing = taken_over(home, earlier.snapshots, earlier.fit_id, target)
        used = earlier.snapshots[-max(0, num_snapshots - (left or 0)) :] if num_snapshots > (left or 0) else ()
        lost = [name for name in used if name in missing]
        if lost and left is not None:
            raise ValueError(
                f"the checkpoint names {len(lost)} snapshots that {home} does not have, {lost[0]!r} for one, and "
                f"methods use the last {num_snapshots}. Leave the folder of the run beside its checkpoints, lower "
                "num_snapshots, or remove these methods."
            )
        if missing and num_snapshots:
            warnings.warn(
                f"the checkpoint names {len(missing)} snapshots that {home} does not have, {missing[0]!r} for one; "
                "methods that need snapshots use only the later ones",
                stacklevel=2,
            )
        return found

    def _was_replacing(self, folder: Path) -> bool:
        """Whether a run was killed that would have replaced the fit in a folder, and the model's weights are its."""
        killed = training_id(folder)
        if not killed or killed == stored_fit_id(folder):
            return False
        # The pass itself checks that its checkpoint is of these weights.
        resumes_pass = self._pass_every is not None and bool(_pass_files(folder, killed))
        return resumes_pass or (self.resumes and self._earlier is not None and self._earlier.fit_id == killed)

    def _warn_of_pass_elsewhere(self) -> None:
        earlier = self._earlier
        if earlier is None or self.pass_files() is None:
            return
        if earlier.folder != self.folder and _pass_files(earlier.folder, earlier.fit_id):
            warnings.warn(
                f"the run of the checkpoint has a killed curvature pass in {earlier.folder}, and this one starts from "
                f"the beginning in {self.folder}; pass dirpath={str(earlier.folder)!r} to resume it",
                stacklevel=2,
            )


def _checkpoint_of(trainer: L.Trainer) -> Path | None:
    """The checkpoint that a trainer has loaded; it does not know the path before that, in `setup`."""
    return Path(trainer.ckpt_path) if trainer.ckpt_path else None


def _pass_files(folder: Path, fit_id: str) -> set[Path]:
    """The `checkpoint` paths of a fit's curvature passes that have left files in a folder."""
    stem = re.escape(PassFiles(folder, 1, fit_id).stem)
    name = re.compile(rf"({stem}[0-9a-f]+)(-rank\d+of\d+)?\.safetensors(\..*)?")
    found = [name.fullmatch(path.name.removeprefix(".")) for path in folder.glob("*curvature_state-*")]
    return {folder / f"{match[1]}.safetensors" for match in found if match is not None} if fit_id else set()


def _check_same(fit: FitResult | None, folders: Sequence[Path]) -> None:
    """Check that all ranks find the same fit. A collective."""
    if len(set(gather_number(0 if fit is None else zlib.crc32(fit.fit_id.encode()) + 1))) > 1:
        raise ValueError(
            f"ranks find different fits in {', '.join(map(str, folders))}, or some find none. Pass dirpath= with a "
            "folder that all machines share."
        )


def _damaged_state(state: object) -> ValueError:
    return ValueError(
        f"the checkpoint's state of BayesianMoECallback is damaged ({state!r:.80}); load another checkpoint of the run"
    )
