"""The stages of the main job: model and data, fine-tuning, posterior, evaluation, report.

Each stage leaves one file behind, written whole or not at all; a stage whose file is there is not done again.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import lightning as L
import transformers
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from bmoe_lightning import BayesianMoECallback, ExpertFinetuner, MultipleChoiceDataModule
from bmoe_lightning.curvature import remove_checkpoint
from bmoe_lightning.experts import ClassLogits
from bmoe_lightning.experts.fsdp import gathered, has_shards
from bmoe_lightning.methods import Method, apply_snapshot, save_snapshot
from bmoe_lightning.methods.storage import CURVATURE_STATE_FILE, has_fitted, load_fitted, save_fitted
from bmoe_lightning.methods.workbench import build_methods
from bmoe_lightning.report import (
    MethodResult,
    label_budget_figure,
    library_versions,
    matplotlib_available,
    results_table,
    save_figure,
    summarise,
    write_figures,
    write_results,
    write_tensorboard,
)
from bmoe_lightning.trainer.prior_mean import PriorMean
from bmoe_lightning.utils.atomic_io import write_text
from bmoe_lightning.utils.distributed import barrier, is_rank_zero, num_processes
from bmoe_lightning.utils.safetensors_io import opened_safetensors, write_safetensors
from recipes.qwen_obqa.distributed import agreed, first_then_others, joined, mesh_of, own_batches, trainer_options
from recipes.qwen_obqa.label_budget import label_budget
from recipes.qwen_obqa.run_folder import begin, check_start, plain_notes
from recipes.qwen_obqa.settings import ResolvedSettings
from recipes.qwen_obqa.sources import RecipeError, Source, prepare_source

__all__ = ["RecipeError", "run"]


def run(settings: ResolvedSettings) -> None:
    """Do everything that the settings ask for, and print the table.

    An earlier run in the output folder goes on if it had the same settings, and is replaced if the settings say so.

    Raises:
        RecipeError: with a sentence, if the model or the data cannot be had, the earlier run had other settings, or a
            setting cannot be used here.
    """
    with plain_notes(), joined(settings):
        _quieten()
        _run(settings)


def _run(settings: ResolvedSettings) -> None:
    started = time.monotonic()
    output = Path(settings.output_dir)
    goes_on, source = first_then_others(lambda: _begun(settings, output))
    if goes_on and is_rank_zero():
        print(f"Going on with the run in {output}: finished stages are not done again; --overwrite starts anew.")
    if is_rank_zero():
        print(source.banner, flush=True)
    results: list[MethodResult] = []
    calibration: list[MethodResult] = []
    for seed in range(settings.first_seed, settings.first_seed + settings.seeds):
        run_of_seed = SeedRun(settings, source, output, seed)
        results += run_of_seed.results("test")
        calibration += run_of_seed.results("val")
    if not is_rank_zero():
        return
    _report(settings, output, results, calibration)
    print(f"\nDone in {time.monotonic() - started:.0f} s. Everything is in {output}; compare the methods with")
    print(f"  tensorboard --logdir {output / 'tensorboard'}", flush=True)


def _begun(settings: ResolvedSettings, output: Path) -> tuple[bool, Source]:
    """Whether an earlier run goes on, and model and questions; the first process notes what the run is."""
    goes_on = check_start(settings, output)
    source = prepare_source(settings)
    if is_rank_zero():
        begin(settings, output, source, goes_on=goes_on)
    return goes_on, source


@dataclass
class SeedRun:
    """All stages of one fine-tuning seed.

    Attributes:
        settings: resolved.
        source: model and data.
        output: folder of the whole run.
        seed: fine-tuning seed.
    """

    settings: ResolvedSettings
    source: Source
    output: Path
    seed: int

    @property
    def folder(self) -> Path:
        """Where this seed's files are."""
        return self.output / f"seed-{self.seed}"

    def results(self, stage: str) -> list[MethodResult]:
        """Predictions of every method on the `test` or calibration (`val`) split, made now or by an earlier run.

        Of several processes the first one has them.
        """
        path = self.folder / "predictions.safetensors"
        if not agreed(path.is_file()):
            self._evaluate(path)
        if not is_rank_zero():
            return []
        return _read_predictions(path, stage, self.seed, self.source.ids(stage))

    def _member(self, index: int) -> Path:
        """Fine-tune one more member of the deep ensemble, if there is none yet; the file with its weights."""
        path = self.folder / f"member-{index}.safetensors"
        if not agreed(path.is_file()):
            self._say(f"fine-tuning member {index + 1} of {self.settings.ensemble_size} of the deep ensemble")
            module, data = self._fresh(index)
            self._trainer([_SaveTrained(path)], f"member-{index}").fit(module, datamodule=data)
        return path

    def _evaluate(self, path: Path) -> None:
        members = []
        if "deep_ensemble" in self.settings.method_names:
            members = [self._member(index) for index in range(1, self.settings.ensemble_size)]
        module, data = self._fresh(0)
        self._train(module, data, members)
        self._say("evaluating")
        # A callback of its own: what is evaluated is what was written.
        callback = self._callback(members)
        trainer = self._trainer([callback])
        trainer.validate(module, datamodule=data, verbose=False)
        trainer.test(module, datamodule=data, verbose=False)
        fitted, snapshots = load_fitted(self._posterior_folder)
        methods = build_methods(
            module, callback.settings, fitted, snapshots=snapshots, ensemble_members=callback.ensemble_members
        )
        if is_rank_zero():
            _write_predictions(path, callback, methods)
        barrier()

    @property
    def _posterior_folder(self) -> Path:
        return self.folder / "bayesian_moe"

    def _callback(self, members: list[Path], class_logits: ClassLogits | None = None) -> BayesianMoECallback:
        settings = self.settings
        return BayesianMoECallback(
            methods=settings.method_names,
            class_logits=class_logits,
            rank=settings.rank,
            fisher=settings.fisher,  # type: ignore[arg-type]  # checked against the same names
            sketch=settings.sketch,  # type: ignore[arg-type]
            link=settings.link,  # type: ignore[arg-type]
            num_samples=settings.num_samples,
            curvature_checkpoint_every=settings.curvature_checkpoint_every,
            dropout=settings.expert_dropout,
            num_snapshots=settings.num_snapshots,
            ensemble_members=[str(member) for member in members],
            dirpath=str(self._posterior_folder),
            seed=self.seed,
        )

    def _train(self, module: ExpertFinetuner, data: MultipleChoiceDataModule, members: list[Path]) -> None:
        """Have the module fine-tuned and the methods fitted and written, as far as an earlier run has not done it."""
        trained = self.folder / "trained.safetensors"
        if not agreed(trained.is_file()):
            size = self.settings.ensemble_size
            member = f" (member 1 of {size} of the deep ensemble)" if members else ""
            self._say(f"fine-tuning the experts{member}, then curvature and calibration")
            self._trainer([_SaveTrained(trained), self._callback(members)], "training").fit(module, datamodule=data)
            return
        # The weights' dtype and the precision of the forward are those of the run that was killed.
        trainer = self._trainer([])
        module.load(mesh_of(self.settings))
        trainer.precision_plugin.convert_module(module)
        if agreed(has_fitted(self._posterior_folder)):
            apply_snapshot(module, trained)
        else:
            self._say("curvature and calibration of the weights that an earlier run fine-tuned")
            self._fit_trained(module, trained, data, members, trainer)
        # Of a run that was killed just after the posterior was written.
        remove_checkpoint(self._posterior_folder / CURVATURE_STATE_FILE)

    def _fit_trained(
        self,
        module: ExpertFinetuner,
        trained: Path,
        data: MultipleChoiceDataModule,
        members: list[Path],
        trainer: L.Trainer,
    ) -> None:
        """Fit the methods to weights that an earlier run has fine-tuned, and write them."""

        def class_logits(model: Any, batch: Any) -> tuple[Tensor, Tensor | None]:
            with trainer.precision_plugin.forward_context():
                return model.class_logits(batch)

        callback = self._callback(members, class_logits)
        pretrained = PriorMean(callback.settings)
        pretrained.remember(module)
        apply_snapshot(module, trained)
        device = trainer.strategy.root_device
        module.to(device)
        lockstep = has_shards(module)
        callback.fit_posterior(
            module,
            own_batches(data.train_dataloader(), device, training=True, lockstep=lockstep),
            own_batches(data.calibration_dataloader(), device, training=False, lockstep=lockstep),
            prior_mean=pretrained.weights,
            distributed=num_processes() > 1,
        )
        assert callback.fitted is not None
        snapshots = sorted((self._posterior_folder / "snapshots").glob("*.safetensors"))
        if is_rank_zero():
            save_fitted(self._posterior_folder, callback.fitted, snapshots)
        barrier()

    def _fresh(self, member: int) -> tuple[ExpertFinetuner, MultipleChoiceDataModule]:
        """An untrained module and the data in this member's order."""
        settings = self.settings
        seed = 1000 * self.seed + member
        L.seed_everything(seed, workers=True, verbose=False)
        data = self.source.data(seed)
        module = ExpertFinetuner(
            self.source.model,
            answer_token_ids=data.answer_token_ids.tolist(),
            train=settings.train,  # type: ignore[arg-type]
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            schedule=settings.schedule,  # type: ignore[arg-type]
            expert_dropout=settings.expert_dropout,
        )
        return module, data

    def _trainer(self, callbacks: list[L.Callback], curves: str | None = None) -> L.Trainer:
        """A trainer; `curves` names its training curves, without which nothing is logged."""
        logger = curves is not None and TensorBoardLogger(
            self.output,
            name="training_curves",
            version=f"seed-{self.seed}-{curves}",
            default_hp_metric=False,
        )
        return L.Trainer(
            max_epochs=self.settings.epochs,
            accelerator=self.settings.accelerator,
            precision=self.settings.precision,  # type: ignore[arg-type]  # Lightning checks it
            gradient_clip_val=1.0,
            callbacks=callbacks,
            logger=logger,
            log_every_n_steps=10,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=not self.settings.quiet,
            # Calibration data decide nothing while training.
            check_val_every_n_epoch=self.settings.epochs,
            num_sanity_val_steps=0,
            default_root_dir=str(self.output),
            **trainer_options(self.settings),
        )

    def _say(self, what: str) -> None:
        if is_rank_zero():
            print(f"[seed {self.seed}] {what}", flush=True)


class _SaveTrained(L.Callback):
    """Writes the trained weights when training ends; first in the list, so that they outlive a failing fit."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, ExpertFinetuner)
        kept = gathered(pl_module.trained_parameters(), keep=trainer.is_global_zero)
        if trainer.is_global_zero:
            save_snapshot(self._path, kept)
        trainer.strategy.barrier()


def _write_predictions(path: Path, callback: BayesianMoECallback, methods: Sequence[Method]) -> None:
    tensors = {}
    for stage, by_method in callback.predictions.items():
        for name, predictions in by_method.items():
            tensors[f"{stage}/{name}/log_probs"] = predictions.log_probs
            tensors[f"{stage}/labels"] = predictions.labels
    described = [{"name": m.name, "label": m.label, "numbers": m.hyperparameters()} for m in methods]
    write_safetensors(path, tensors, {"methods": json.dumps(described)})


def _read_predictions(path: Path, stage: str, seed: int, ids: tuple[str, ...]) -> list[MethodResult]:
    with opened_safetensors(path) as file:
        labels = file.get_tensor(f"{stage}/labels")
        return [
            MethodResult(
                method=described["name"],
                label=described["label"],
                seed=seed,
                log_probs=file.get_tensor(f"{stage}/{described['name']}/log_probs"),
                target=labels,
                ids=ids,
                extra=described["numbers"],
            )
            for described in json.loads(file.metadata()["methods"])
        ]


def _report(
    settings: ResolvedSettings, output: Path, results: list[MethodResult], calibration: list[MethodResult]
) -> None:
    rows = summarise(results)
    config = asdict(settings)
    write_results(output, results, rows, config=config, versions=library_versions())
    hyperparameters: dict[str, bool | int | float | str] = {
        "rank": settings.rank,
        "fisher": settings.fisher,
        "link": settings.link,
    }
    comparison = output / "tensorboard"
    if comparison.is_dir():  # of the run that is being resumed; written anew, since events only ever add up
        shutil.rmtree(comparison)
    write_tensorboard(comparison, results, rows, hyperparameters=hyperparameters)
    points = label_budget(results, calibration)
    if points:
        write_text(output / "label_budget.json", json.dumps([asdict(point) for point in points], indent=2) + "\n")
    if matplotlib_available():  # write_tensorboard has said so otherwise
        write_figures(output / "figures", results, rows)
        if points:
            save_figure(label_budget_figure(points), output / "figures" / "label_budget.png")
    print("\n" + results_table(rows), flush=True)


def _quieten() -> None:
    """Leave the screen to the training's progress bars and the table."""
    transformers.utils.logging.disable_progress_bar()
    # Its retries are no news: what they come to is said in one sentence.
    huggingface_hub.utils.logging.set_verbosity_error()
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in (
        ".*does not have many workers.*",
        ".*LeafSpec.*",
        ".*Checkpoint directory.*",
        ".*logging interval.*",
        ".*recommended to use `Trainer.*",  # on several processes; repeated examples are not counted here
    ):
        warnings.filterwarnings("ignore", message=message)
