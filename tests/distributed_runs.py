"""Fit, test and predict with one process and with several, and write down what each process has to say.

A script of its own, since a process that has run a backward pass cannot be forked: `python distributed_runs.py FOLDER
whole|few|small|launched WORLD_SIZE...`.
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

from bmoe_lightning.callback import BayesianMoECallback
from bmoe_lightning.curvature.spec import Curvature
from bmoe_lightning.methods import (
    DeepEnsemble,
    LaplaceEvidence,
    LaplaceLPO,
    LaplaceMixture,
    LaplaceTemperature,
    Method,
    fit_methods,
    get_method,
    save_snapshot,
)
from bmoe_lightning.methods.snapshots import swapped_weights
from bmoe_lightning.methods.storage import save_fit
from bmoe_lightning.methods.training_data import Batches
from bmoe_lightning.methods.workbench import Workbench
from bmoe_lightning.prediction_writer import PredictionWriter
from bmoe_lightning.trainer import run_folder as run_files
from bmoe_lightning.trainer.evaluation import EvaluationRun

TRAIN, CALIBRATION, TEST = 50, 113, 47  # 3 divides none of them, and 2 only the first
METHODS = (
    "map",
    "checkpoint_ensemble",
    "deep_ensemble",
    "temperature",
    "laplace_evidence",
    "laplace_lpo",
    "laplace_mixture",
    "laplace_temperature",
    "evidence_temperature",
    "shrunk_temperature",
)


MEMBER, MEMBER_FIT = "member.safetensors", "member-fit"
OF_MEMBER = LaplaceEvidence(prior_mean="zero", num_samples=200)


def methods(folder: Path) -> list[str | Method]:
    """All of `METHODS`, with few samples; the folder has the weights of another run, and a fit to them."""
    runs, fits = (str(folder / MEMBER),), (str(folder / MEMBER_FIT),)
    mixture = LaplaceMixture(
        component=OF_MEMBER.name, prior_mean=OF_MEMBER.prior_mean, num_samples=200, runs=runs, fits=fits
    )
    lean = {
        "deep_ensemble": DeepEnsemble(runs=runs),
        "laplace_evidence": LaplaceEvidence(num_samples=200),
        "laplace_lpo": LaplaceLPO(num_samples=200),
        "laplace_mixture": mixture,
        "laplace_temperature": LaplaceTemperature(num_samples=200),
    }
    return [lean.get(name, name) for name in METHODS]


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
    """Writes down what a process knows at the end of each stage.

    Args:
        folder: Folder of the files.
        watched: The callback.
        stage: Name of what ends with a fit.
        tell: What is written down besides, as JSON.
    """

    def __init__(self, folder: Path, watched: BayesianMoECallback, stage: str = "fit", tell=dict) -> None:
        self.folder = folder
        self.watched = watched
        self.stage = stage
        self.tell = tell

    def _file(self, trainer, stage: str, ending: str) -> Path:
        return self.folder / f"{stage}-{trainer.world_size}-{trainer.global_rank}.{ending}"

    def on_fit_end(self, trainer, pl_module):
        fitted, folder = self.watched.fitted, self.watched.state_dict()["folder"]
        content = {
            "scalars": fitted.scalars(self.watched.methods),
            "states": {
                name: {key: value.tolist() for key, value in method.state.items()}
                for name, method in fitted.methods.items()
            },
            "id": fitted.fit_id,
            "folder": folder,
            "sees": (Path(folder) / "index.json").exists(),
            "wrote": list(writes),
        }
        for digest in fitted.posteriors:
            fitted.served_posterior(digest).save(self._file(trainer, self.stage, "safetensors"))
        self._file(trainer, self.stage, "json").write_text(json.dumps({**content, **self.tell()}))

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
            if function.__name__ == "save_fit":
                time.sleep(0.2)  # who did not wait would find no file
            return function(*args, **options)

        return call

    run_files.save_fit = watched(run_files.save_fit)
    run_files.save_snapshot = watched(run_files.save_snapshot)
    EvaluationRun.report = watched(EvaluationRun.report)


def train(path: Path) -> None:
    """A model that has learned something, for what is fitted to it to have a value."""
    L.seed_everything(0, verbose=False)
    module = ToyModule()
    trainer(path.parent, [], max_epochs=4).fit(module, loader(320, 9, shuffle=True))
    save_file(module.state_dict(), path)
    make_member(path)


def make_member(path: Path) -> None:
    """The weights of another run, and a fit to them by one process."""
    module = SameWeights(path).double()
    weights = {n: -p for n, p in ToyModule(seed=1).double().named_parameters() if "down_proj" in n}
    save_snapshot(path.with_name(MEMBER), weights)
    with swapped_weights(module, path.with_name(MEMBER)):
        method = OF_MEMBER.with_defaults(Curvature())
        fit = fit_methods([method], module, ToyModule.class_logits, loader(TRAIN, 1, batch_size=8))
    save_fit(path.with_name(MEMBER_FIT), fit)


def plain_logits(model, class_logits, batches, *, distributed=False):
    """Logits and labels of held-out batches, as a method without curvature sees them."""
    needing = [get_method("temperature")]
    return Workbench(model, class_logits, needing, Batches([]), batches, distributed=distributed).calibration_logits()


def train_elsewhere(path: Path) -> None:
    """Train in a process of its own, so that this one may still be forked."""
    child = multiprocessing.get_context("fork").Process(target=train, args=(path,))
    child.start()
    child.join()


def options(world_size: int, **others) -> dict:
    launched = {"devices": world_size, "strategy": "ddp_fork"} if world_size > 1 else {"devices": 1}
    return {**launched, "precision": "64-true", "num_sanity_val_steps": 0, "max_epochs": 2, **others}


def whole(world_size: int, folder: Path, weights: Path) -> None:
    """All methods, from fitting to prediction."""
    writes.clear()
    written = str(folder / f"written-{world_size}")
    callback = BayesianMoECallback(methods(folder), dirpath=written)
    module = SameWeights(weights).double()  # or a launched process would return its weights rounded
    witness = Witness(folder, callback)
    logger = L.pytorch.loggers.TensorBoardLogger(folder, name=f"logs-{world_size}", version="run")
    run = trainer(folder, [callback, witness], **options(world_size))
    run.fit(module, loader(TRAIN, 1, shuffle=True, batch_size=8), loader(CALIBRATION, 2))
    # The process of the test is another one, and finds the posterior by its folder.
    again = BayesianMoECallback(methods(folder), dirpath=written, predict_method="laplace_lpo")
    writer = PredictionWriter(str(folder / f"rows-{world_size}.jsonl"))
    run = trainer(folder, [again, Witness(folder, again), writer], **options(world_size, logger=logger))
    run.test(module, loader(TEST, 3), verbose=False)
    run.predict(module, loader(TEST, 3), return_predictions=False)


def few(world_size: int, folder: Path, weights: Path) -> None:
    """A fit and a test with a few methods alone."""
    callback = BayesianMoECallback(
        ("map", "temperature", "laplace_evidence"), dirpath=str(folder / f"fit-{world_size}")
    )
    module = SameWeights(weights).double()
    run = trainer(folder, [callback, Witness(folder, callback)], **options(world_size))
    run.fit(module, loader(TRAIN, 1, batch_size=8), loader(CALIBRATION, 2))
    run.test(module, loader(TEST, 3), verbose=False)


def small(world_size: int, folder: Path, weights: Path) -> None:
    """Less data than processes, a capped pass, a sampler of the user's own, labels that are drawn, no labels."""
    sets = {
        "tiny": (loader(2, 1), loader(2, 2), {"methods": ("laplace_evidence", "laplace_temperature")}),
        "capped": (loader(TRAIN, 1, batch_size=4), loader(CALIBRATION, 2), {"curvature": Curvature(max_batches=2)}),
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
            {
                "methods": ("laplace_evidence",),
                "curvature": Curvature(fisher="mc", sketch="nystrom", approximation="reduce"),
            },
        ),
        "reduced": (
            loader(TRAIN, 1),
            None,
            {
                "methods": ("laplace_evidence",),
                "curvature": Curvature(rank=2, sketch="nystrom", approximation="reduce"),
            },
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
    """`fit_methods`, without a trainer: by all processes together, then by the last one alone."""
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
    chosen = [get_method(name).with_defaults(Curvature()) for name in ("map", "laplace_lpo")]
    fit = fit_methods(chosen, module, ToyModule.class_logits, training, calibration, distributed=True)
    content = {"scalars": fit.scalars(chosen)}
    fit.served_posterior(Curvature().digest).save(folder / f"direct-{world_size}-{rank}.safetensors")
    if rank == world_size - 1:
        alone = fit_methods(chosen, module, ToyModule.class_logits, training, calibration)
        content["alone"] = alone.posteriors[Curvature().digest].factors.num_examples
    (folder / f"direct-{world_size}-{rank}.json").write_text(json.dumps(content))
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
    # As after a kill: fresh modules, which start from other weights on each process again, and no fit in the folder.
    index = Path(callback.state_dict()["folder"]) / "index.json"
    if run.is_global_zero:
        index.rename(index.with_suffix(".hidden"))
    dist.barrier()
    again = BayesianMoECallback(callback.methods, dirpath=str(folder / "again"))
    run = trainer(folder, [again, Witness(folder, again, "again")], devices=world_size, strategy="ddp", max_epochs=3)
    again.fit_posterior(
        Several(seed=int(os.environ.get("LOCAL_RANK", 0))),
        trainer=run,
        train_dataloaders=loader(151, 1, shuffle=True),
        val_dataloaders=loader(CALIBRATION, 2),
        ckpt_path=str(folder / "last.ckpt"),
    )
    dist.barrier()
    if run.is_global_zero:
        index.with_suffix(".hidden").rename(index)


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
        train_elsewhere(learned)
    for size in sizes:
        for run in {"whole": [whole], "few": [few], "small": [small, direct], "launched": [launched]}[kind]:
            run(size, where, learned)
    leave()
