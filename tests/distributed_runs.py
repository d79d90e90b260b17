"""Fit, test and predict with one process and with several, and write down what each process has to say.

A script of its own, since a process that has run a backward pass cannot be forked: `python distributed_runs.py FOLDER
whole|small|launched|resumed WORLD_SIZE...`.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
import warnings
from pathlib import Path

import lightning as L
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, Subset, WeightedRandomSampler
from toy import ToyData, ToyModule, loader, trainer

import bmoe_lightning.callback as callback_module
from bmoe_lightning.callback import BayesianMoECallback
from bmoe_lightning.curvature import collect_factors, remove_checkpoint
from bmoe_lightning.curvature.checkpoint import own_path
from bmoe_lightning.methods import save_snapshot
from bmoe_lightning.trainer import run_folder as run_files
from bmoe_lightning.trainer.evaluation import EvaluationRun

TRAIN, CALIBRATION, TEST = 50, 113, 47  # neither 2 nor 3 divides any of them
METHODS = (
    "map",
    "checkpoint_ensemble",
    "deep_ensemble",
    "temperature",
    "laplace_evidence",
    "laplace_lpo",
    "laplace_temperature",
    "evidence_temperature",
    "shrunk_temperature",
)


class SameWeights(ToyModule):
    """Ends at the same weights however many steps an epoch has; collects no metrics of its own."""

    def __init__(self, weights: Path):
        super().__init__()
        self.load_state_dict(load_file(weights))
        self.network.set_experts_implementation("eager")  # the default has no float64

    def on_train_epoch_start(self):
        with torch.no_grad():
            for name, parameter in self.network.named_parameters():
                if "experts.down_proj" in name:
                    parameter.mul_(0.9)

    def validation_step(self, batch, batch_idx):
        return None

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Witness(L.Callback):
    """Writes down what a process knows at the end of each stage."""

    def __init__(self, folder: Path, watched: BayesianMoECallback) -> None:
        self.folder = folder
        self.watched = watched

    def _file(self, trainer, stage: str, ending: str) -> Path:
        return self.folder / f"{stage}-{trainer.world_size}-{trainer.global_rank}.{ending}"

    def on_train_end(self, trainer, pl_module):
        fitted = self.watched.fitted
        content = {"scalars": fitted.scalars(), "folder": str(self.watched._files.folder), "wrote": writes}
        if fitted.posterior is not None:
            fitted.posterior.save(self._file(trainer, "fit", "safetensors"))
        self._file(trainer, "fit", "json").write_text(json.dumps(content))

    def on_test_end(self, trainer, pl_module):
        predictions = self.watched.predictions["test"]
        found = {name: p.log_probs.contiguous() for name, p in predictions.items()}
        save_file({**found, "labels": predictions["map"].labels}, self._file(trainer, "test", "safetensors"))
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self._file(trainer, "test", "json").write_text(json.dumps({"metrics": metrics, "wrote": writes}))

    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        path = self._file(trainer, f"predict{batch_idx}", "safetensors")
        save_file({"probs": outputs["probs"].contiguous(), "ids": batch["input_ids"]}, path)


writes: list[str] = []
"""What this process wrote."""


def watch_writing() -> None:
    def watched(function):
        def call(*args, **options):
            writes.append(function.__name__)
            return function(*args, **options)

        return call

    callback_module.save_fitted = watched(callback_module.save_fitted)
    run_files.save_snapshot = watched(run_files.save_snapshot)
    EvaluationRun.write_tensorboard = watched(EvaluationRun.write_tensorboard)


def train(path: Path) -> None:
    """A model that has learned something, for what is fitted to it to have a value."""
    L.seed_everything(0, verbose=False)
    module = ToyModule()
    trainer(path.parent, [], max_epochs=4).fit(module, loader(320, 9, shuffle=True))
    save_file(module.state_dict(), path)


def options(world_size: int, **others) -> dict:
    launched = {"devices": world_size, "strategy": "ddp_fork"} if world_size > 1 else {"devices": 1}
    return {**launched, "precision": "64-true", "num_sanity_val_steps": 0, "max_epochs": 2, **others}


def whole(world_size: int, folder: Path, weights: Path) -> None:
    """All methods, from fitting to prediction."""
    writes.clear()
    member = folder / f"member-{world_size}.safetensors"
    save_snapshot(member, {n: -p for n, p in ToyModule(seed=1).double().named_parameters() if "down_proj" in n})
    settings = {"methods": METHODS, "num_samples": 200, "ensemble_members": [str(member)]}
    written = str(folder / f"written-{world_size}")
    callback = BayesianMoECallback(**settings, dirpath=written)
    module = SameWeights(weights).double()  # or a launched process would return its weights rounded
    witness = Witness(folder, callback)
    logger = L.pytorch.loggers.TensorBoardLogger(folder, name=f"logs-{world_size}", version="run")
    run = trainer(folder, [callback, witness], **options(world_size))
    run.fit(module, loader(TRAIN, 1, shuffle=True, batch_size=8), loader(CALIBRATION, 2))
    # The process of the test is another one, and finds the posterior by its folder.
    again = BayesianMoECallback(**settings, dirpath=written)
    run = trainer(folder, [again, Witness(folder, again)], **options(world_size, logger=logger))
    run.test(module, loader(TEST, 3), verbose=False)
    run.predict(module, loader(TEST, 3), return_predictions=False)


def small(world_size: int, folder: Path, weights: Path) -> None:
    """Less data than processes, a capped pass, a sampler of the user's own, labels that are drawn, no labels."""
    sets = {
        "tiny": (loader(2, 1), loader(2, 2), {"methods": ("laplace_evidence", "laplace_temperature")}),
        "capped": (loader(TRAIN, 1, batch_size=4), loader(CALIBRATION, 2), {"curvature_batches": 2}),
        "drop": (
            DataLoader(ToyData(TRAIN - 1, 1), batch_size=5, drop_last=True),
            loader(CALIBRATION, 2),
            {"methods": ("laplace_evidence",)},
        ),
        "weighted": (
            DataLoader(ToyData(4, 1), batch_size=2, sampler=WeightedRandomSampler([1.0] * 4, 4, replacement=False)),
            None,
            {"methods": ("laplace_evidence",)},
        ),
        "mc": (
            loader(200, 1),
            None,
            {"methods": ("laplace_evidence",), "fisher": "mc", "sketch": "nystrom", "approximation": "reduce"},
        ),
        "reduced": (
            loader(TRAIN, 1),
            None,
            {"methods": ("laplace_evidence",), "sketch": "nystrom", "approximation": "reduce", "rank": 2},
        ),
        "unlabelled": (loader(TRAIN, 1), loader(CALIBRATION, 2), {"methods": ("evidence_temperature",)}),
        "plain": (loader(TRAIN, 1), loader(CALIBRATION, 2), {"methods": ("temperature",)}),
    }
    for name, (training, calibration, settings) in sets.items():
        (folder / name).mkdir(exist_ok=True)
        callback = BayesianMoECallback(**settings)
        run = trainer(folder / name, [callback, Witness(folder / name, callback)], **options(world_size))
        torch.manual_seed(world_size)
        run.fit(SameWeights(weights), training, calibration)


def direct(world_size: int, folder: Path, weights: Path) -> None:
    """`fit_posterior` without a trainer: by all processes together, then by the last one alone."""
    context = multiprocessing.get_context("fork")
    children = [
        context.Process(target=one_of_several, args=(r, world_size, folder, weights)) for r in range(world_size)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join()


def one_of_several(rank: int, world_size: int, folder: Path, weights: Path) -> None:
    store = dist.FileStore(str(folder / f"store-{world_size}"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    module = SameWeights(weights).double()
    training, calibration = (
        DataLoader(Subset(ToyData(size, seed), range(rank, size, world_size)), batch_size=16)
        for size, seed in ((TRAIN, 1), (CALIBRATION, 2))
    )
    written = folder / f"direct-{world_size}"
    callback = BayesianMoECallback(dirpath=str(written))
    writes.clear()
    callback.fit_posterior(module, training, calibration, distributed=True)
    content = {"scalars": callback.fitted.scalars(), "wrote": list(writes), "sees": (written / "methods.json").exists()}
    callback.fitted.posterior.save(folder / f"direct-{world_size}-{rank}.safetensors")
    if rank == world_size - 1:
        callback.fit_posterior(module, training, calibration)
        content["alone"] = callback.fitted.posterior.factors.num_examples
    (folder / f"direct-{world_size}-{rank}.json").write_text(json.dumps(content))
    dist.barrier()
    dist.destroy_process_group()


class Killed(Exception):
    pass


def stopping(batches, after: int):
    for number, batch in enumerate(batches):
        if number == after:
            raise Killed
        yield batch


def resumed(world_size: int, folder: Path, weights: Path) -> None:
    """Curvature that is cut off on all processes and goes on."""
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=resuming, args=(r, world_size, folder, weights)) for r in range(world_size)]
    for child in children:
        child.start()
    for child in children:
        child.join()


def remove_own(path: Path) -> None:
    """Remove all that one process has written."""
    for file in path.parent.glob(f"{path.name}*"):
        file.unlink()


def resuming(rank: int, world_size: int, folder: Path, weights: Path) -> None:
    store = dist.FileStore(str(folder / f"store-{world_size}"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    module = SameWeights(weights).double()
    batches = list(DataLoader(Subset(ToyData(25, 1), range(rank, 25, world_size)), batch_size=2))
    path = folder / f"sums-{world_size}.safetensors"
    calls, said = [], {}

    def class_logits(model, batch):
        calls.append(time.monotonic())
        if rank == 1:
            time.sleep(0.2)  # the others would be far ahead of it
        return model.class_logits(batch)

    def collect(name, data=batches, **options):
        calls.clear()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            error = None
            try:
                factors = collect_factors(module, class_logits, data, rank=3, distributed=True, **options)
                found = {f"{i}.{n}": t for i, layer in enumerate(factors.layers) for n, t in layer.tensors().items()}
                save_file(
                    {n: t.contiguous() for n, t in found.items()}, folder / f"{name}-{world_size}-{rank}.safetensors"
                )
            except (Killed, ValueError) as raised:
                error = str(raised)
        files = sorted(p.name for p in folder.glob(f"*sums-{world_size}*"))
        said[name] = {
            "calls": len(calls),
            "times": list(calls),
            "error": error,
            "warned": [str(w.message) for w in caught],
            "files": files,
        }
        dist.barrier()

    for fisher, sketch in (("exact", "nystrom"), ("mc", "exact")):
        options = {"fisher": fisher, "sketch": sketch}
        kept = {**options, "checkpoint": path, "checkpoint_every": 2}
        collect(f"{fisher}-whole", **options)
        collect(f"{fisher}-killed", stopping(batches, 3), **kept)
        collect(f"{fisher}-resumed", **kept)
        collect(f"{fisher}-finished", **kept)  # killed after its last batch
        remove_checkpoint(path)
        dist.barrier()
    options = {"checkpoint": path, "checkpoint_every": 1}
    collect("differing-killed", stopping(batches, 3), **options)
    if rank == 1:  # killed between two writes of its own
        own_path(path, distributed=True).unlink()
    dist.barrier()
    collect("differing-resumed", **options)
    remove_checkpoint(path)
    dist.barrier()
    collect("missing-killed", stopping(batches, 3), **options)
    if rank == 1:
        remove_own(own_path(path, distributed=True))
    dist.barrier()
    collect("missing-resumed", **options)
    if rank == 1:
        own_path(path, distributed=True).write_bytes(b"damaged")
    dist.barrier()
    collect("damaged", **options)
    remove_checkpoint(path)
    dist.barrier()
    collect("removed", batches[:0] if rank else batches, checkpoint=path, checkpoint_every=2)
    collect("nothing-again", batches[:0] if rank else batches, checkpoint=path, checkpoint_every=2)
    (folder / f"resumed-{world_size}-{rank}.json").write_text(json.dumps({"said": said, "batches": len(batches)}))
    dist.barrier()
    dist.destroy_process_group()


class Several(ToyModule):
    """May be validated on several loaders."""

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        return None


def launched(world_size: int, folder: Path, weights: Path) -> None:
    """Real training with `strategy="ddp"`, which runs this script once more for every other process."""
    L.seed_everything(int(os.environ.get("LOCAL_RANK", 0)), verbose=False)
    module = Several(seed=int(os.environ.get("LOCAL_RANK", 0)))  # DDP starts with the first process's weights
    callback = BayesianMoECallback(
        methods=("map", "laplace_evidence", "laplace_lpo")
    )  # writes into the logger's folder
    logger = L.pytorch.loggers.CSVLogger(folder)
    witness = Witness(folder, callback)
    run = trainer(folder, [callback, witness], devices=world_size, strategy="ddp", logger=logger, max_epochs=3)
    run.fit(module, loader(151, 1, shuffle=True), loader(CALIBRATION, 2))
    run.test(module, loader(TEST, 3), verbose=False)
    run.validate(module, [loader(TEST, 3), loader(TEST, 4, shuffle=True)], verbose=False)
    content = {name: float(value) for name, value in run.callback_metrics.items()}
    (folder / f"validate-{run.global_rank}.json").write_text(json.dumps(content))
    run.save_checkpoint(folder / "last.ckpt")


def leave() -> None:
    """End a process that has written everything, without ending its interpreter first.

    Gloo's threads may outlive the interpreter, even after their group is destroyed if a model that FSDP2 has sharded
    still refers to it; one that frees a tensor then aborts the process.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    watch_writing()
    where, kind, sizes = Path(sys.argv[1]), sys.argv[2], [int(size) for size in sys.argv[3:]]
    learned = where / "trained.safetensors"
    if kind != "launched":
        child = multiprocessing.get_context("fork").Process(target=train, args=(learned,))
        child.start()
        child.join()
    for size in sizes:
        for run in {"whole": [whole], "small": [small, direct], "launched": [launched], "resumed": [resumed]}[kind]:
            run(size, where, learned)
    leave()
