"""The output folder of a callback, and the files of earlier runs in it."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import lightning as L
from torch import nn

from bmoe_lightning.curvature.checkpoint import remove_checkpoint
from bmoe_lightning.experts.fingerprint import module_fingerprint
from bmoe_lightning.experts.fsdp import gathered, has_shards, reshard
from bmoe_lightning.methods.fit_index import SNAPSHOT_FOLDER, has_fit, stored_snapshots
from bmoe_lightning.methods.fit_result import FitResult
from bmoe_lightning.methods.snapshots import remove_snapshot, save_snapshot
from bmoe_lightning.methods.storage import load_fit, save_fit
from bmoe_lightning.methods.training_data import PassFiles
from bmoe_lightning.trainer.checks import is_trial
from bmoe_lightning.trainer.earlier_run import EarlierRun, pass_files, possible_homes
from bmoe_lightning.trainer.folders import (
    check_name,
    claim,
    claimed_version,
    default_folder,
    folders_of_other_runs,
    is_version,
    killed_versions,
    mark_weights,
    unmark_training,
    versions_with_fit,
)
from bmoe_lightning.trainer.killed_runs import check_replaceable, ended_without_fit, run_of_weights
from bmoe_lightning.trainer.signals import report_stop
from bmoe_lightning.trainer.snapshot_files import copied, epoch_of, new_snapshot
from bmoe_lightning.trainer.stored_fits import Search, find_fit, places_of_fit
from bmoe_lightning.utils.atomic_io import remove_all_leftovers
from bmoe_lightning.utils.distributed import together
from bmoe_lightning.utils.folder_lock import FolderLock

T = TypeVar("T")


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
        check_name(name)
        # Absolute: a process that resumes from a checkpoint may run in another directory.
        self.given = Path(given, name).absolute() if given is not None else None
        self.folder = self.given
        self.fit_id = uuid.uuid4().hex
        self.snapshots: list[Path] = []
        self._name = name
        self._pass_every = pass_every
        self._earlier: EarlierRun | None = None
        self._loaded: Path | None = None  # the checkpoint of this run
        self._run = ""
        self._epochs_before = 0  # of the snapshots taken over, that the trainer does not count
        self._several = False
        self._lock = FolderLock()
        self._search = Search(None, {}, ())
        self._named: list[Path] = []
        self._is_of_fit = False
        self._weights: str | None = ""  # the last weights of this process's training; None while it trains
        self.resumes = False

    def settle(self, trainer: L.Trainer) -> None:
        """Have all processes write into one folder: the given one, or one in the logger's. A collective."""
        default = default_folder(trainer, self._name)
        if self.folder is not None and is_version(self.folder, default):
            default = self.folder
        # A path with the time in it is another one on each process, and so is a random id.
        known = (self.given, default, self.fit_id, uuid.uuid4().hex)
        self.given, default, self.fit_id, self._run = trainer.strategy.broadcast(known)
        self.folder = None if is_trial(trainer) else self.given or default
        self._several = trainer.world_size > 1
        # Unless a checkpoint is loaded; the last run may have ended before it used its own.
        self.resumes, self._loaded = False, None

    def begin_training(self, trainer: L.Trainer, num_snapshots: int = 0) -> None:
        """Adopt the snapshots of a resumed run, or start a new fit. A collective.

        A default folder that another run uses is replaced by its next version. So is that of a finished run whose
        checkpoint is resumed.

        Args:
            trainer: Trainer within a fit.
            num_snapshots: Number of snapshots that methods use.

        Raises:
            ValueError: If snapshots of the resumed run are missing that methods will use.
            OSError: If the folder cannot be written to.
            FolderInUseError: If another process is training into the folder that the user specified.
        """
        earlier = self._earlier if self.resumes else None
        self.fit_id = uuid.uuid4().hex
        self._is_of_fit, self._weights = False, None
        epochs = trainer.max_epochs
        left = None if epochs is None or epochs < 0 else epochs - trainer.current_epoch

        def begin() -> tuple[Path | None, str, list[Path]]:
            if self.folder is None:
                return None, self.fit_id, []
            if earlier is not None:
                self.fit_id = earlier.id_of_next(self._homes_and_versions(trainer))
            folder = self._claimed(self.folder)
            mark_weights(folder, self.fit_id, "")
            self.remove_pass_files()
            return folder, self.fit_id, self._from_earlier(trainer, earlier, folder, num_snapshots, left)

        self._begin(trainer, begin)
        # A tuner that ran before the trainer had restored its progress has made it start at epoch 0 again.
        trained = epoch_of(self.snapshots[-1]) + 1 if self.snapshots else 0
        self._epochs_before = max(0, trained - trainer.current_epoch)
        self.resumes = False

    def begin_fit(self, trainer: L.Trainer, module: nn.Module) -> None:
        """Record the weights that methods are fitted to when training ends, not always those of a snapshot.

        A collective. A later process whose model has them completes the fit if this one is killed.

        Raises:
            OSError: If the folder cannot be written to.
        """
        weights = self._weights = module_fingerprint(module)
        if (folder := self.folder) is not None:
            self._from_rank_zero(trainer, lambda: mark_weights(folder, self.fit_id, weights))

    def stop(self, trainer: L.Trainer, module: nn.Module, exception: BaseException) -> None:
        """Report a signal that stopped the trainer, and record the weights of an interrupted training.

        This process can then fit the methods to them.
        """
        report_stop(exception, self.folder, evaluates=trainer.state.fn != "fit")
        if self._weights is None and isinstance(exception, KeyboardInterrupt) and not has_shards(module):
            self._weights = module_fingerprint(module)

    def begin_completion(
        self, trainer: L.Trainer, module: nn.Module, fit: FitResult | None, num_snapshots: int = 0
    ) -> None:
        """Find the folder, and the snapshots, of a fit without training. A collective.

        Without a fit it is that of the training run of the checkpoint, or of one that ended with the model's weights
        or was killed while fitting. A default folder that has another fit is replaced by its next version.

        Args:
            trainer: Trainer within a fit.
            module: The module, with the weights that are fitted.
            fit: Fit to the model's weights that is completed; None fits anew.
            num_snapshots: Number of snapshots that methods use.

        Raises:
            ValueError: If the checkpoint names snapshots that methods use, and some are missing.
            WeightMismatchError: If the folder that the user specified has a fit to other weights, unless a killed run
                was about to replace it; or if methods use snapshots, and those that a killed run left are of a
                training that is not known to have led to the model's weights.
            FolderInUseError: If another process is training into it.
        """
        weights = module_fingerprint(module) if fit is None else ""

        def find() -> tuple[Path | None, str, list[Path]]:
            folder = self.folder
            if folder is None:
                return None, self.fit_id, self.snapshots
            if fit is not None:
                self.fit_id = fit.fit_id
                return self._claimed(folder), self.fit_id, self.snapshots
            if self._earlier is not None and self._pass_every is not None:
                self._earlier.warn_of_pass(folder)
            if self.given is not None and has_fit(folder):
                known = {self.fit_id} if weights == self._weights else set()  # of this process, or of the checkpoint
                if self.resumes and self._earlier is not None:
                    known.add(self._earlier.fit_id)
                check_replaceable(folder, weights, known, resumes_pass=self._pass_every is not None)
            if self._is_of_fit:  # to other weights
                self.fit_id, self.snapshots, self._weights = uuid.uuid4().hex, [], ""
            if self._earlier is not None and self.resumes and self._earlier.fit_id:
                self.fit_id = self._earlier.id_of_next(self._homes_and_versions(trainer))
                folder = self._claimed(folder)
                return folder, self.fit_id, self._from_earlier(trainer, self._earlier, folder, num_snapshots, 0)
            if self._weights != weights:
                places = [folder] if self.given is not None else killed_versions(folder, self._lock)
                passes = self.given is not None and self._pass_every is not None
                run = run_of_weights(places, weights, uses_snapshots=num_snapshots > 0, resumes_pass=passes)
                folder, self.fit_id, self.snapshots = run or (folder, uuid.uuid4().hex, [])
            return self._claimed(folder), self.fit_id, self.snapshots

        self._begin(trainer, find)
        self.resumes = False

    def save_snapshot(self, trainer: L.Trainer, module: L.LightningModule, num_snapshots: int) -> None:
        """Write a snapshot of the trained weights, and remove the oldest surplus ones. A collective.

        Raises:
            OSError: If it cannot be written.
        """
        if self.folder is None:
            return
        epoch = self._epochs_before + trainer.current_epoch
        path = trainer.strategy.broadcast(new_snapshot(self.folder, self.fit_id, epoch))
        reshard(module)
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        gathered_weights = gathered(trained, keep=trainer.is_global_zero)
        fingerprint = module_fingerprint(module)
        before = [earlier for earlier in self.snapshots if epoch_of(earlier) < epoch]
        surplus = before[: max(0, len(before) + 1 - num_snapshots)]

        def write() -> None:
            save_snapshot(path, gathered_weights, fit=self.fit_id, weights=fingerprint)
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
            for written in (folder, folder / SNAPSHOT_FOLDER):  # of an earlier process that was killed
                remove_all_leftovers(written)
            self._lock.release()
            return snapshots

        self.snapshots = self._from_rank_zero(trainer, write)
        self._is_of_fit = True

    def load(self, trainer: L.Trainer, model: nn.Module, offload: Collection[str] = ()) -> FitResult | None:
        """Load the fit of an earlier process to a model's weights, with its snapshots. A collective.

        It is searched in the given folder, if that has a fit; else in the one that the loaded checkpoint names, in
        those beside the checkpoint (a run's folder may have been moved), in all versions of the default folder, and in
        the folders of the other runs of the logger.

        Args:
            trainer: The trainer.
            model: The model.
            offload: Digests of the curvatures whose factors are offloaded to the CPU.

        Returns:
            The fit; None if there is none, see `missing_fit`.

        Raises:
            ValueError: If it is damaged, mixes files of two fits, or ranks do not find the same fit.
            FileNotFoundError: If one of its files is missing.
            OSError: If one of its files cannot be read.
        """
        self._named, others = self._from_rank_zero(trainer, lambda: self._places(trainer))
        self._search = find_fit([*self._named, *others], model, distributed=self._several)
        folder = self._search.folder
        if folder is None:
            return None
        fit, self.snapshots = together(lambda: load_fit(folder, offload=offload), distributed=self._several)
        self.fit_id, self._is_of_fit = fit.fit_id, True
        if self.folder is not None and self.given is None and is_version(folder, self.folder):
            self.folder = folder
        return fit

    def has_any_fit(self, trainer: L.Trainer) -> bool:
        """Whether a folder that `load` searches has a fit, to whichever weights. A collective."""
        return self._from_rank_zero(trainer, lambda: any(map(has_fit, itertools.chain(*self._places(trainer)))))

    def ended_without_fit(self, trainer: L.Trainer, module: nn.Module) -> bool:
        """Whether the run of the loaded checkpoint has no fit, and was fitting the module's weights when it was killed.

        Those may be others than the checkpoint's, if a callback averages weights. A collective.
        """
        weights, earlier = module_fingerprint(module), self._earlier
        if earlier is None:
            return not self.has_any_fit(trainer)

        def find() -> bool:
            return ended_without_fit(self._homes_and_versions(trainer), earlier.fit_id, weights)

        return self._from_rank_zero(trainer, find)

    def missing_fit(self) -> Exception:
        """The error after `load` has found no fit; it names the folders, and why each was refused."""
        return self._search.error()

    def has_unreadable_fit(self) -> bool:
        """Whether `load` could not read the fit in a folder that the user or the checkpoint names, or one beside it.

        A fit to other weights is none: a script that validates before it trains may be run a second time.
        """
        return self._search.has_unreadable(self._named)

    def release(self) -> None:
        """Release the folder for other processes."""
        self._lock.release()

    def pass_files(self) -> PassFiles | None:
        """Location of the checkpoints of curvature passes."""
        if self.folder is None or self._pass_every is None:
            return None
        return PassFiles(self.folder, self._pass_every, self.fit_id)

    def remove_pass_files(self) -> None:
        """Remove the checkpoints of this fit's curvature passes, which are complete or belong to earlier weights."""
        if self.folder is not None:
            for path in pass_files(self.folder, self.fit_id):
                remove_checkpoint(path)

    def state_dict(self) -> dict[str, Any]:
        """Folder, fit id and snapshot names, for a checkpoint; those of the resumed run until training begins."""
        names = tuple(path.name for path in self.snapshots)
        present = None if self.folder is None else EarlierRun(self.folder, self.fit_id, names)
        return EarlierRun.state(self._earlier if self.resumes else present) | {"run": self._run}

    def has_saved(self, state: object) -> bool:
        """Whether a state is of this very run, which Lightning's tuners restore after their trials."""
        return isinstance(state, Mapping) and bool(self._run) and state.get("run") == self._run

    def load_checkpoint(self, trainer: L.Trainer) -> None:
        """Forget what an earlier checkpoint said of its run, before one of another run is loaded."""
        # Within a fit, its weights are trained further, or methods are fitted to them.
        self._earlier, self.resumes = None, trainer.state.fn == "fit"
        self._loaded = _checkpoint_of(trainer)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the folder and fit of a checkpoint's run."""
        self._earlier = EarlierRun.of_state(state_dict)

    def _begin(self, trainer: L.Trainer, find: Callable[[], tuple[Path | None, str, list[Path]]]) -> None:
        """Find folder, fit id and snapshots on rank 0, and release the folders that were locked if it fails."""
        try:
            self.folder, self.fit_id, self.snapshots = self._from_rank_zero(trainer, find)
        except BaseException:
            self._lock.release()
            raise

    def _claimed(self, folder: Path) -> Path:
        """Lock and mark the folder of this fit: the given one, or a version of the default one."""
        if self.given is None:
            folder = claimed_version(folder, self.fit_id, self._lock)
        else:
            claim(folder, self.fit_id, self._lock)
        self.folder = folder
        return folder

    def _places(self, trainer: L.Trainer) -> tuple[list[Path], list[Path]]:
        others = partial(folders_of_other_runs, trainer, self._name)
        return places_of_fit(self.given, self._homes(trainer), self.folder, others)

    def _from_rank_zero(self, trainer: L.Trainer, action: Callable[[], T]) -> T:
        """Call a function on rank 0 and broadcast its result; all ranks raise if it fails. A collective."""
        found = together(lambda: action() if trainer.is_global_zero else None, distributed=trainer.world_size > 1)
        return cast("T", trainer.strategy.broadcast(found))

    def _homes(self, trainer: L.Trainer) -> list[Path]:
        # The trainer's own is that of a tuner, once that has restored the run.
        return possible_homes(self._earlier, self._loaded or _checkpoint_of(trainer), self._name)

    def _from_earlier(
        self, trainer: L.Trainer, earlier: EarlierRun | None, folder: Path, num_snapshots: int, left: int | None
    ) -> list[Path]:
        if earlier is None:
            return []
        return earlier.take_over(self._homes(trainer)[0], folder, self.fit_id, num_snapshots, left)

    def _homes_and_versions(self, trainer: L.Trainer) -> list[Path]:
        return [*self._homes(trainer), *([] if self.folder is None else versions_with_fit(self.folder))]


def _checkpoint_of(trainer: L.Trainer) -> Path | None:
    """The checkpoint that a trainer has loaded; it does not know the path before that, in `setup`."""
    return Path(trainer.ckpt_path) if trainer.ckpt_path else None
