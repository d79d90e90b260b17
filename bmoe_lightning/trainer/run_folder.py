"""The output folder of a callback, and the files of earlier runs in it."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import uuid
import warnings
import zlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from bmoe_lightning.curvature.checkpoint import remove_checkpoint
from bmoe_lightning.experts.fsdp import gathered, reshard
from bmoe_lightning.laplace.posterior import WeightMismatchError
from bmoe_lightning.methods.fit_result import FitResult
from bmoe_lightning.methods.snapshots import remove_snapshot, save_snapshot, snapshot_info
from bmoe_lightning.methods.storage import INDEX_FILE, SNAPSHOT_FOLDER, has_fit, load_fit, save_fit, stored_fit_id
from bmoe_lightning.methods.workbench import PassFiles
from bmoe_lightning.trainer.checks import is_trial
from bmoe_lightning.utils.distributed import gather_number

_SNAPSHOT_NAME = re.compile(r"[0-9a-f]{8}-epoch-\d{4,}\.safetensors")


class RunFolder:
    """The output folder of a run, and its snapshots.

    Only files with the id of this run's fit are removed.

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
        self.given = Path(given, name) if given is not None else None
        self.folder = self.given
        self.fit_id = uuid.uuid4().hex
        self.snapshots: list[Path] = []
        self._name = name
        self._pass_every = pass_every
        self._earlier: tuple[Path, str, list[str]] | None = None  # folder, fit id and snapshot names of a checkpoint
        self._several = False
        self.resumes = False

    def settle(self, trainer: L.Trainer) -> None:
        """Have all processes write into one folder: the given one, or one in the logger's. A collective."""
        default = _latest_version(_log_folder(trainer) / "bayesian_moe" / self._name)
        # A path with the time in it is another one on each process, and so is a random id.
        self.given, default, self.fit_id = trainer.strategy.broadcast((self.given, default, self.fit_id))
        self.folder = None if is_trial(trainer) else self.given or default
        self._several = trainer.world_size > 1

    def begin_training(self, trainer: L.Trainer) -> None:
        """Adopt the snapshots of a resumed run, or start a new fit. A collective.

        A default folder that contains the fit of another run is replaced by its next version.
        """
        earlier = self._earlier if self.resumes else None
        self.fit_id, self.snapshots = (uuid.uuid4().hex if earlier is None else earlier[1]), []
        if trainer.is_global_zero:
            if self.folder is not None and self.given is None:
                self.folder = _free_version(self.folder, self.fit_id)
            _check_writable(self.folder)
            self.remove_pass_files()
            if earlier is not None:
                folder, fit_id, names = earlier
                self.snapshots = _taken_over(folder, names, fit_id, self.folder)
        settled = trainer.strategy.broadcast((self.folder, self.fit_id, self.snapshots))
        self.folder, self.fit_id, self.snapshots = settled
        self.resumes = False

    def continue_training_of(self, trainer: L.Trainer) -> None:
        """Find the snapshots of a training run that ended, or was killed while fitting. A collective."""
        if trainer.is_global_zero:
            _check_writable(self.folder)
            self._warn_of_pass_elsewhere()
        if trainer.is_global_zero and not self.snapshots:
            if self._earlier is not None and self.resumes:
                folder, self.fit_id, names = self._earlier
                self.snapshots = _taken_over(folder, names, self.fit_id, self.folder)
            elif self.folder is not None:
                self.snapshots = _latest_snapshots(self.folder / SNAPSHOT_FOLDER)
                if self.snapshots:
                    self.fit_id = snapshot_info(self.snapshots[-1]).fit
        self.fit_id, self.snapshots = trainer.strategy.broadcast((self.fit_id, self.snapshots))
        self.resumes = False

    def save_snapshot(self, trainer: L.Trainer, module: L.LightningModule, num_snapshots: int) -> None:
        """Write a snapshot of the trained weights, and remove the oldest surplus ones. A collective."""
        if self.folder is None:
            return
        name = f"{self.fit_id[:8]}-epoch-{trainer.current_epoch:04d}.safetensors"
        path = self.folder / SNAPSHOT_FOLDER / name
        self.snapshots = [*(earlier for earlier in self.snapshots if earlier != path), path]
        surplus = self.snapshots[:-num_snapshots]
        del self.snapshots[:-num_snapshots]
        reshard(module)
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        gathered_weights = gathered(trained, keep=trainer.is_global_zero)
        if trainer.is_global_zero:
            save_snapshot(path, gathered_weights, fit=self.fit_id)
            for earlier in surplus:
                remove_snapshot(earlier)

    def save(self, fit: FitResult) -> None:
        """Write a fit with the run's snapshots, copied if they are in another folder. Call it on rank 0 only."""
        if self.folder is not None:
            target = self.folder / SNAPSHOT_FOLDER
            self.snapshots = [_copied(path, target / path.name) for path in self.snapshots]
            save_fit(self.folder, fit, self.snapshots)

    def load(self, offload: Collection[str] = ()) -> FitResult | None:
        """Load the fit of an earlier process with its snapshots; None if there is none. A collective.

        Raises:
            ValueError: If it is damaged, mixes files of two fits, or ranks do not find the same fit.
            FileNotFoundError: If one of its files is missing.
        """
        earlier = None if self._earlier is None else self._earlier[0]
        folders = [folder for folder in (self.given, earlier, self.folder) if folder is not None]
        folder = next((folder for folder in folders if has_fit(folder)), None)
        fit, snapshots = (None, []) if folder is None else load_fit(folder, offload=offload)
        if self._several:
            _check_same(fit, folders)
        if fit is not None:
            self.fit_id, self.snapshots = fit.fit_id, snapshots
        return fit

    def set_aside(self) -> None:
        """Ignore a fit to other weights, and its snapshots.

        Raises:
            WeightMismatchError: If the new fit would overwrite it.
        """
        if self.folder is not None and has_fit(self.folder):
            raise WeightMismatchError(
                f"{self.folder} has a fit to other weights than the model's, which is not overwritten. Load the "
                f"checkpoint that it was fitted to, pass another dirpath=, or remove its {INDEX_FILE}."
            )
        self.fit_id, self.snapshots = uuid.uuid4().hex, []  # continue_training_of broadcasts rank 0's id

    def pass_files(self) -> PassFiles | None:
        """Location of the checkpoints of curvature passes."""
        if self.folder is None or self._pass_every is None:
            return None
        return PassFiles(self.folder, self._pass_every)

    def _warn_of_pass_elsewhere(self) -> None:
        if self._earlier is None or self.pass_files() is None:
            return
        folder = self._earlier[0]
        if folder != self.folder and any(folder.glob("curvature_state-*.safetensors")):
            warnings.warn(
                f"the run of the checkpoint has a killed curvature pass in {folder}, and this one starts from the "
                f"beginning in {self.folder}; pass dirpath={str(folder)!r} to resume it",
                stacklevel=2,
            )

    def remove_pass_files(self) -> None:
        """Remove the checkpoints of curvature passes that are complete or belong to earlier weights."""
        if self.folder is not None:
            for path in self.folder.glob("curvature_state-????????.safetensors"):
                remove_checkpoint(path)
            for path in self.folder.glob("curvature_state-????????-rank*.safetensors"):
                remove_checkpoint(path.with_name(f"{path.name.partition('-rank')[0]}.safetensors"))

    def state_dict(self) -> dict[str, Any]:
        """Folder, fit id and snapshot names, for a checkpoint."""
        return {
            "folder": None if self.folder is None else str(self.folder),
            "fit": self.fit_id,
            "snapshots": [path.name for path in self.snapshots],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the folder and fit of a checkpoint's run."""
        if state_dict.get("folder"):
            names = [str(name) for name in state_dict.get("snapshots", [])]
            self._earlier = (Path(state_dict["folder"]), str(state_dict.get("fit", "")), names)


def _check_same(fit: FitResult | None, folders: Sequence[Path]) -> None:
    """Check that all ranks find the same fit. A collective."""
    if len(set(gather_number(0 if fit is None else zlib.crc32(fit.fit_id.encode()) + 1))) > 1:
        raise ValueError(
            f"ranks find different fits in {', '.join(map(str, folders))}, or some find none. Pass dirpath= with a "
            "folder that all machines share."
        )


def _check_writable(folder: Path | None) -> None:
    """Check that a folder is writable, before there is anything to write."""
    if folder is not None:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise OSError(
                f"the fit cannot be written to {folder}: {there} is not a writable folder; pass another dirpath="
            )


def _log_folder(trainer: L.Trainer) -> Path:
    """The folder of a run's logger, by the rule of Lightning's `ModelCheckpoint`; without a logger the root folder.

    Loggers such as those of Weights & Biases and MLflow have one `save_dir` for all runs.
    """
    log_dir = trainer.log_dir  # read on every rank: it may be a collective
    logger = trainer.loggers[0] if trainer.loggers else None
    if logger is None or isinstance(logger, (TensorBoardLogger, CSVLogger)):
        return Path(log_dir or trainer.default_root_dir)
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return Path(log_dir or trainer.default_root_dir) / str(logger.name) / version


def _versions(folder: Path) -> Iterator[Path]:
    """A folder, then its versions `-v1`, `-v2`, ..., as in the file names of `ModelCheckpoint`."""
    yield folder
    for number in itertools.count(1):
        yield folder.with_name(f"{folder.name}-v{number}")


def _latest_version(folder: Path) -> Path:
    """The last version of a folder with a fit; the folder itself if there is none."""
    with_fit = list(itertools.takewhile(has_fit, _versions(folder)))
    return with_fit[-1] if with_fit else folder


def _free_version(folder: Path, fit_id: str) -> Path:
    """The first version of a folder that contains no fit of another run."""
    first = folder.with_name(re.sub(r"-v\d+$", "", folder.name))
    candidates = itertools.chain([folder], _versions(first))
    return next(path for path in candidates if stored_fit_id(path) in (None, fit_id))


def _latest_snapshots(folder: Path) -> list[Path]:
    """The snapshots of the training run that wrote the latest one, in the order of epochs."""
    found = [path for path in folder.glob("*.safetensors") if _SNAPSHOT_NAME.fullmatch(path.name)]
    if not found:
        return []
    latest = max(found, key=lambda path: path.stat().st_mtime_ns)
    return sorted(path for path in found if path.name[:8] == latest.name[:8])


def _taken_over(folder: Path, names: list[str], fit_id: str, target: Path | None) -> list[Path]:
    """The snapshots of a resumed run, copied to the output folder."""
    if target is None:
        return []
    found = []
    for name in names:
        path, copy = folder / SNAPSHOT_FOLDER / name, target / SNAPSHOT_FOLDER / name
        if not _SNAPSHOT_NAME.fullmatch(name) or not path.is_file() or snapshot_info(path).fit != fit_id:
            warnings.warn(
                f"the checkpoint names a snapshot {name!r}, which {folder / SNAPSHOT_FOLDER} does not have for this "
                "run; methods that need snapshots use only the later ones",
                stacklevel=2,
            )
            continue
        found.append(_copied(path, copy))
    return found


def _copied(path: Path, copy: Path) -> Path:
    """Copy a snapshot atomically, unless the target exists; returns the target."""
    if not copy.exists():
        copy.parent.mkdir(parents=True, exist_ok=True)
        partial = copy.with_name(f".{copy.name}.copy.tmp")
        shutil.copyfile(path, partial)
        partial.replace(copy)
    return copy
