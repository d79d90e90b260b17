"""Fit what training has left unfitted, with one process, with DDP and with FSDP2: killed, loaded, added to.

`python completed_runs.py FOLDER ddp|spawn|fsdp WORLD_SIZE...`; files are in `FOLDER/ddp` and so on. Lightning runs
this script once more for every other process of FSDP2; `ddp` has to run first, and leaves the weights to start from.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from distributed_runs import (
    CALIBRATION,
    TEST,
    TRAIN,
    SameWeights,
    Witness,
    leave,
    options,
    train_elsewhere,
    watch_writing,
    writes,
)
from lightning.pytorch.callbacks import ModelCheckpoint
from resumed_runs import Killed
from sharded_runs import ShardedWeights, rank, strategy
from torch.multiprocessing import ProcessRaisedException
from toy import loader, trainer

from bmoe_lightning import BayesianMoECallback
from bmoe_lightning.methods import apply_snapshot, get_method
from bmoe_lightning.trainer import stored_fits

METHODS = ("map", "checkpoint_ensemble", "temperature", "laplace_evidence", "laplace_lpo")
FEW, MORE = ("map", "laplace_evidence"), ("map", "temperature", "laplace_evidence", "laplace_lpo")
BATCH_SIZE = 4
KILLED_AT = 3
"""Batches of the curvature pass before a process is killed."""
FIRST = 3
"""Calls in the checks of the first batches of both loaders."""

fits: list[str] = []
"""Names of the methods that this process has fitted."""


def watch_fitting() -> None:
    def watched(fit):
        def call(method, work):
            fits.append(method.name)
            return fit(method, work)

        return call

    for name in METHODS:
        kind = type(get_method(name))
        if "fit" in vars(kind):
            kind.fit = watched(kind.fit)


class Passes:
    """`class_logits` of a callback: counts the batches of its passes over data, and may be killed at one of them."""

    def __init__(self, killed_at: int | None = None) -> None:
        self.batches = 0
        self.killed_at = killed_at

    def __call__(self, module, batch):
        if self.batches == self.killed_at:
            if dist.is_initialized():
                dist.barrier()  # until all have written their sums
            raise Killed
        self.batches += 1
        return module.class_logits(batch)

    def tell(self) -> dict[str, Any]:
        return {"batches": self.batches, "fits": list(fits)}


class Loads(L.Callback):
    """Puts trained weights into a module after all callbacks before it have seen those from before."""

    def __init__(self, snapshot: Path) -> None:
        self.snapshot = snapshot

    def on_fit_start(self, trainer, pl_module):
        apply_snapshot(pl_module, self.snapshot)


class Runs:
    """Trainings and fits with one strategy.

    Args:
        world_size: Number of processes.
        folder: Folder of all files.
        build: Makes the module with the weights from before training.
        launch: Options of the trainer.
    """

    def __init__(self, world_size: int, folder: Path, build: Callable[[], Any], launch: Callable[[], dict]) -> None:
        self.world_size = world_size
        self.folder = folder
        self.build = build
        self.launch = launch

    def written(self, name: str) -> Path:
        return self.folder / f"{name}-{self.world_size}-written"

    def checkpoint(self, name: str) -> Path:
        return self.folder / f"{name}-{self.world_size}.ckpt"

    def tell(self, name: str, content: Any) -> None:
        (self.folder / f"{name}-{self.world_size}-{rank()}.json").write_text(json.dumps(content))

    def trainer(self, stage: str, callback: BayesianMoECallback, passes: Passes, *others: L.Callback) -> L.Trainer:
        writes.clear()
        fits.clear()
        saves = any(isinstance(other, ModelCheckpoint) for other in others)
        callbacks = [callback, *others, Witness(self.folder, callback, stage, passes.tell)]
        return trainer(self.folder, callbacks, **options(self.world_size, enable_checkpointing=saves, **self.launch()))

    def train(self, stage: str, names: tuple[str, ...], *, killed_at: int | None = None, **chosen: Any) -> None:
        """Train, and fit at the end of it."""
        passes = Passes(killed_at)
        callback = BayesianMoECallback(names, class_logits=passes, dirpath=str(self.written(stage)), **chosen)
        saves = ModelCheckpoint(self.folder, filename=self.checkpoint(stage).stem)
        self.trainer(stage, callback, passes, saves).fit(self.build(), *data())

    def complete(
        self,
        stage: str,
        names: tuple[str, ...],
        *others: L.Callback,
        run: str = "",
        module: L.LightningModule | None = None,
        prior_mean: dict[str, torch.Tensor] | None = None,
        **chosen: Any,
    ) -> None:
        """Fit without training: in a fresh process's place, for the run of another stage if one is named."""
        passes = Passes()
        callback = BayesianMoECallback(names, class_logits=passes, dirpath=str(self.written(run or stage)), **chosen)
        by = self.trainer(stage, callback, passes, *others)
        module = self.build() if module is None else module
        training, calibration = data()
        callback.fit_posterior(
            module,
            trainer=by,
            train_dataloaders=training,
            val_dataloaders=calibration,
            ckpt_path=str(self.checkpoint(run)) if run else None,
            prior_mean=prior_mean,
        )
        assert by.global_step in (0, 2 * by.num_training_batches)  # no step of its own
        if stage == "resumed":
            by.test(module, loader(TEST, 3), verbose=False)


def data():
    return loader(TRAIN + 1, 1, shuffle=True, batch_size=BATCH_SIZE), loader(CALIBRATION, 2)


def names_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def killed(runs: Runs) -> None:
    """A run that is killed in its curvature pass; then a fresh process has its folder and a checkpoint."""
    with suppress(Killed, ProcessRaisedException):
        # The first batch of both loaders comes before training.
        runs.train("killed", METHODS, killed_at=FIRST + KILLED_AT, curvature_checkpoint_every=1)
        raise AssertionError("it was not killed")
    runs.tell("left", names_in(runs.written("killed")))
    runs.complete("resumed", METHODS, run="killed", curvature_checkpoint_every=1)
    runs.tell("resumed-files", names_in(runs.written("killed")))


def loaded(runs: Runs, before: dict[str, torch.Tensor]) -> None:
    """Trained weights that another callback loads, and such that the module has from the start."""
    snapshot = max((runs.written("fit") / "snapshots").iterdir())
    runs.complete("loaded", MORE, Loads(snapshot))
    module = runs.build()
    apply_snapshot(module, snapshot)
    runs.complete("given", MORE, module=module, prior_mean=before)


def added(runs: Runs) -> None:
    """Methods that are added to a finished run; afterwards nothing is missing."""
    runs.train("few", FEW)
    posterior = runs.written("few") / "posterior.safetensors"
    before = posterior.stat().st_mtime_ns
    runs.complete("added", MORE, run="few")
    runs.complete("nothing", MORE, run="few")
    runs.tell("untouched", posterior.stat().st_mtime_ns == before)


def unshared(runs: Runs) -> None:
    """A folder with a finished fit that the first process alone sees."""
    has_fit = stored_fits.has_fit
    stored_fits.has_fit = lambda folder: rank_in_group() == 0 and has_fit(folder)
    try:
        runs.complete("unshared", MORE, run="few")
        runs.tell("unshared", None)
    except (ValueError, ProcessRaisedException) as error:
        runs.tell("unshared", str(error))
    finally:
        stored_fits.has_fit = has_fit


def rank_in_group() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    watch_writing()
    watch_fitting()
    where, kind, sizes = Path(sys.argv[1]), sys.argv[2], [int(size) for size in sys.argv[3:]]
    weights = where / "trained.safetensors"
    if kind == "ddp":
        train_elsewhere(weights)
    own = where / kind
    own.mkdir(exist_ok=True)
    for size in sizes:
        build, launch = {
            "ddp": (SameWeights, dict),
            "spawn": (SameWeights, lambda: {"strategy": "ddp_spawn"}),
            # A precision that leaves a module as it is.
            "fsdp": (ShardedWeights, lambda size=size: {"precision": "32-true", "strategy": strategy(size)}),
        }[kind]
        runs = Runs(size, own, lambda build=build: build(weights).double(), launch)
        if kind == "spawn":
            runs.train("few", FEW)
            runs.complete("added", MORE, run="few")
            continue
        runs.train("fit", METHODS)
        killed(runs)
        start = SameWeights(weights).double()
        loaded(runs, {name: p.detach() for name, p in start.named_parameters() if "down_proj" in name})
        added(runs)
        unshared(runs)
    leave()
