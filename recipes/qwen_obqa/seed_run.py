"""All stages of one fine-tuning seed: training, fits and evaluation.

Each stage writes a file atomically; a stage whose file exists is not repeated. For a method that is added to a finished
run, only that method is fitted and evaluated.
"""

from __future__ import annotations

import gc
import hashlib
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from bmoe_lightning import BayesianMoECallback, ExpertFinetuner, LoRAFinetuner, MultipleChoiceDataModule
from bmoe_lightning.base_finetuner import Finetuner
from bmoe_lightning.curvature.checkpoint import FORMAT as PASS_FORMAT
from bmoe_lightning.data import Question
from bmoe_lightning.data.batches import PaddingSide
from bmoe_lightning.laplace.posterior import WeightMismatchError
from bmoe_lightning.methods import DataMismatchError, FitResult, Method
from bmoe_lightning.methods.fit_index import INDEX_FILE, has_fit, stored_snapshots
from bmoe_lightning.methods.storage import load_fit
from bmoe_lightning.report import MethodResult
from bmoe_lightning.trainer.fit_only import fit_only
from bmoe_lightning.trainer.prior_mean import PriorMean
from bmoe_lightning.trainer.progress import LoopProgressLines
from bmoe_lightning.utils.distributed import barrier, is_rank_zero
from bmoe_lightning.utils.safetensors_io import remove_tensor_file
from recipes.qwen_obqa.distributed import agreed, first_then_others, trainer_options
from recipes.qwen_obqa.exported_model import check_origin, export, export_folder, is_exported
from recipes.qwen_obqa.further_runs import is_finished, with_files
from recipes.qwen_obqa.methods import run_curvature
from recipes.qwen_obqa.run_folder import FIT_FOLDER, MEMBER_FITS, check_pretrained, fingerprint_of
from recipes.qwen_obqa.settings import ResolvedSettings
from recipes.qwen_obqa.sources import Source
from recipes.qwen_obqa.stored_predictions import StoredPredictions
from recipes.qwen_obqa.stored_weights import LoadTrained, SaveTrained, StopAtSignal, has_weights, keeps_weights
from recipes.qwen_obqa.zero_shot import ZERO_SHOT, predict_zero_shot

_CURVES = "training_curves"


@dataclass
class SeedRun:
    """All stages of one fine-tuning seed.

    Attributes:
        settings: Resolved settings.
        source: Model and data.
        methods: Methods of the run, in the order of the table.
        output: Folder of the run.
        seed: Fine-tuning seed.
        identity: Digest of the settings and questions that trained weights and fits depend on.
    """

    settings: ResolvedSettings
    source: Source
    methods: tuple[Method, ...]
    output: Path
    seed: int
    identity: str
    _padding_side: PaddingSide | None = field(default=None, init=False, repr=False)
    _shared_prompts: bool | None = field(default=None, init=False, repr=False)

    @property
    def folder(self) -> Path:
        """Folder of this seed's files."""
        return self.output / f"seed-{self.seed}"

    @property
    def fit_folder(self) -> Path:
        """Folder of this seed's fit."""
        return self.folder / FIT_FOLDER

    @property
    def predictions(self) -> StoredPredictions:
        """This seed's predictions of the test split."""
        return self._stored(self.folder)

    def predictions_of(self, other: str) -> StoredPredictions:
        """This seed's predictions of the test split of another data set."""
        folder, questions = self.folder / f"predictions-{other}", self.source.others[other].splits.test
        return StoredPredictions(folder, self.identity, fingerprint_of(questions))

    def results(self) -> list[MethodResult]:
        """Predictions on the test split, in the order of the table: of every method, and those before fine-tuning."""
        results = self._read(self.predictions, self.source.test)
        if self.settings.zero_shot:
            ids = tuple(question.id for question in self.source.test)
            results.append(self.zero_shot_predictions.read(ZERO_SHOT, self.seed, ids))
        return results

    def results_of(self, other: str) -> list[MethodResult]:
        """Predictions of every method on another data set, in the order of the table."""
        return self._read(self.predictions_of(other), self.source.others[other].splits.test)

    def _read(self, predictions: StoredPredictions, questions: Sequence[Question]) -> list[MethodResult]:
        ids = tuple(question.id for question in questions)
        return [predictions.read(method, self.seed, ids) for method in self.methods]

    @property
    def zero_shot_predictions(self) -> StoredPredictions:
        """The test split's predictions before fine-tuning: the first seed's, if all seeds start from the same model."""
        if self.source.small_model is not None:
            return self.predictions
        return self._stored(self.output / f"seed-{self.settings.first_seed}")

    def _stored(self, folder: Path) -> StoredPredictions:
        return StoredPredictions(folder / "predictions", self.identity, fingerprint_of(self.source.test))

    def complete(self) -> None:
        """Run the stages that an earlier run has not finished."""
        # Rank zero decides by the files for all ranks: files may appear while the others check.
        missing = [method for method in self.methods if not agreed(self.predictions.has(method))]
        if not missing and not agreed(is_rank_zero() and self._fitted(self.fit_folder) is not None):
            missing = list(self.methods)  # the report reads the fit, which is damaged or lost
        zero_shot = self.settings.zero_shot and not agreed(self.zero_shot_predictions.has(ZERO_SHOT))
        if (missing or zero_shot) and (weights := self._model()[1]):
            self._say(f"pre-trained weights {weights}")
            first_then_others(lambda: check_pretrained(self.output, self.seed, weights))
        if zero_shot:
            self._evaluate_zero_shot()
        if missing:
            self._complete_methods(missing)
        for other in self.source.others:
            stored = self.predictions_of(other)
            if missing := [method for method in self.methods if not agreed(stored.has(method))]:
                self._evaluate_other(missing, other)
        folder = export_folder(self.settings, self.seed)
        if folder is not None:
            self._save_model(folder)

    def check_export(self) -> None:
        """Refuse another run's model in the folder of this seed's; see `check_origin`."""
        folder = export_folder(self.settings, self.seed)
        if folder is not None:
            check_origin(folder, self._trained, self._stage(0))

    def lost_of(self, method: Method, keeps: Callable[[Path, str], bool] = keeps_weights) -> str | None:
        """What a method is fitted to or predicts with that is not stored or damaged, in words; None if it is all there.

        Files are only read.

        Args:
            method: Method, as the run's settings have it.
            keeps: `keeps_weights`, or a function that remembers what this has found.
        """
        runs = range(1, method.needs.runs + 1)
        if not all(keeps(self._weights(index), self._stage(index)) for index in (0, *runs)):
            return "fine-tuned weights"
        if not all(is_finished(method.needs.run_methods, self._member_folder(index)) for index in runs):
            return "fits to further fine-tuned weights"
        snapshots = [path for path in stored_snapshots(self.fit_folder) if path.is_file()]
        return "weights after the last epochs" if len(snapshots) < method.needs.snapshots else None

    def with_trained(self, action: Callable[[L.Trainer, Finetuner, Mapping[str, Tensor] | None], None]) -> None:
        """Run an action with the fine-tuned module, which is stored, in a trainer that is set up as for training.

        No training step runs, and no file is written.

        Args:
            action: Function of the trainer, the module on its device, and the weights from before fine-tuning if a
                method uses them.
        """
        module, data = self._fresh(0)
        prior_mean = PriorMean(self.methods)
        load = LoadTrained(self._trained, before=prior_mean.capture)

        def run(trainer: L.Trainer, trained: L.LightningModule) -> None:
            assert isinstance(trained, Finetuner)
            action(trainer, trained, prior_mean.weights)

        try:
            fit_only(self._trainer([load]), load, module, run, datamodule=data)
        finally:
            self._detach(module, data)

    def _evaluate_zero_shot(self) -> None:
        self._say("evaluating the model before fine-tuning")
        module, data = self._fresh(0)
        callback = BayesianMoECallback(methods=[ZERO_SHOT], seed=self.seed)
        predictions = predict_zero_shot(callback, self._trainer([callback]), module, data)
        self._detach(module, data)
        if is_rank_zero():
            self.zero_shot_predictions.write(ZERO_SHOT, FitResult(seed=self.seed), predictions)
        barrier()

    def _save_model(self, folder: Path) -> None:
        """Write the fine-tuned model for transformers, unless an earlier run has."""
        if not agreed(has_weights(self._trained, self._stage(0))):
            methods = [self.with_runs(method) for method in self.methods]
            self._train_and_fit(*self._fresh(0), methods)
        if agreed(first_then_others(lambda: is_rank_zero() and is_exported(folder, self._trained))):
            return
        self._say(f"saving the fine-tuned model in {folder}")
        module, trainer = self._fresh(0)[0], self._trainer([])

        def write() -> None:
            if is_rank_zero():
                export(folder, self._trained, module, trainer, self.source.tokenizer)

        first_then_others(write)

    def _complete_methods(self, missing: Sequence[Method]) -> None:
        """Train and fit what an earlier run has not, and evaluate the methods without predictions."""
        try:
            self._fit_and_evaluate(missing)
        except (WeightMismatchError, DataMismatchError) as error:
            # All ranks compare the same weights and data, so the error is raised on all of them.
            warnings.warn(f"{error} The methods are fitted again", stacklevel=2)
            if is_rank_zero():
                for folder in (self.fit_folder, *self.folder.glob(MEMBER_FITS)):
                    (folder / INDEX_FILE).unlink(missing_ok=True)
            barrier()
            self._fit_and_evaluate(missing)

    def _fit_and_evaluate(self, missing: Sequence[Method]) -> None:
        # First, so that their trainings draw no random number between the seeding and the training of this run.
        methods = [self.with_runs(method) for method in self.methods]
        module, data = self._fresh(0)
        self._train_and_fit(module, data, methods)
        names = ", ".join(method.name for method in missing)
        self._say("evaluating" if len(missing) == len(self.methods) else f"evaluating {names}")
        self._evaluate(missing, module, data, self.predictions)

    def _evaluate_other(self, missing: Sequence[Method], other: str) -> None:
        self._say(f"evaluating on {other}")
        data = self.source.data_of(other, self._padding_side, self._shared_prompts)
        self._evaluate(missing, self._module(data), data, self.predictions_of(other))

    def _evaluate(
        self,
        missing: Sequence[Method],
        module: Finetuner,
        data: MultipleChoiceDataModule,
        stored: StoredPredictions,
    ) -> None:
        """Predict the test split of a DataModule with fitted methods."""
        # A new callback, so that the evaluation uses the files of the fit.
        callback = self._callback([self.with_runs(method) for method in missing], self.fit_folder)
        load = LoadTrained(self._trained)
        self._trainer([load, callback]).test(module, datamodule=data, verbose=False)
        self._detach(module, data)
        if is_rank_zero():
            assert callback.fitted is not None
            for method in missing:
                stored.write(method, callback.fitted, callback.predictions["test"][method.name])
        barrier()

    def _model(self) -> tuple[str, str]:
        """The model that this seed starts from, and the hash of its weights."""
        return first_then_others(lambda: (self.source.model_of(self.seed), self.source.model_hash(self.seed)))

    @property
    def _trained(self) -> Path:
        return self._weights(0)

    def _weights(self, member: int) -> Path:
        """The file with the weights of a fine-tuning run: this one, or a further one for an ensemble."""
        return self.folder / (f"member-{member}.safetensors" if member else "trained.safetensors")

    def _stage(self, member: int) -> str:
        """Digest of everything that determines the weights of a fine-tuning run."""
        return hashlib.sha256(f"{self.identity} {self.seed} {member}".encode()).hexdigest()

    def with_runs(self, method: Method) -> Method:
        """The method with the files of the further fine-tuning runs that it needs; missing ones are made now."""
        count, run_methods = method.needs.runs, method.needs.run_methods
        return with_files(
            method,
            lambda index: self._member(index, count + 1),
            lambda index: self._member_fit(index, count + 1, run_methods),
        )

    def with_stored_runs(self, method: Method) -> Method:
        """The method with the files of the further fine-tuning runs that it needs, where these are; none is made."""
        return with_files(method, self._weights, self._member_folder)

    def _member(self, index: int, size: int) -> Path:
        """The file with the weights of one further fine-tuning run, trained now if it is missing."""
        path = self._weights(index)
        if not agreed(has_weights(path, self._stage(index))):
            if is_rank_zero():
                shutil.rmtree(self._member_folder(index), ignore_errors=True)  # of weights that are trained again
            self._say(f"fine-tuning member {index + 1} of {size} of an ensemble")
            module, data = self._fresh(index)
            save = SaveTrained(path, self._stage(index))
            self._trainer([save], f"member-{index}", limit_val_batches=0).fit(module, datamodule=data)
            self._detach(module, data)
        return path

    def _member_folder(self, index: int) -> Path:
        """Folder of the fit to the weights of one further fine-tuning run."""
        return self.folder / MEMBER_FITS.replace("*", str(index))

    def _member_fit(self, index: int, size: int, methods: Sequence[Method]) -> Path:
        """The folder with the fit of some methods to the weights of one further run, fitted now if it is missing."""
        folder = self._member_folder(index)
        if missing := self._unfitted(methods, folder):
            self._say(f"fitting {', '.join(missing)} to member {index + 1} of {size} of an ensemble")
            self._fit(methods, self._member(index, size), folder, *self._fresh(index))
        return folder

    def _callback(self, methods: Sequence[Method], folder: Path) -> BayesianMoECallback:
        return BayesianMoECallback(
            methods=methods,
            curvature=run_curvature(self.settings),
            curvature_checkpoint_every=self.settings.curvature_checkpoint_every,
            dirpath=str(folder),
            seed=self.seed,
        )

    def _train_and_fit(self, module: Finetuner, data: MultipleChoiceDataModule, methods: Sequence[Method]) -> None:
        """Fine-tune the module and fit the methods, unless an earlier run has."""
        if not agreed(has_weights(self._trained, self._stage(0))):
            if is_rank_zero() and self.fit_folder.is_dir():
                shutil.rmtree(self.fit_folder)  # of a training that was killed, or of weights that are trained again
            trained = "LoRA's matrices" if self.settings.train == "lora" else "the experts"
            self._say(f"fine-tuning {trained}, then curvature and calibration")
            save, callback = SaveTrained(self._trained, self._stage(0)), self._callback(methods, self.fit_folder)
            self._trainer([save, callback], "training").fit(module, datamodule=data)
            self._detach(module, data)
        elif missing := self._unfitted(methods, self.fit_folder):
            self._say(f"fitting {', '.join(missing)} to the fine-tuned weights")
            self._fit(methods, self._trained, self.fit_folder, module, data)

    def _fit(
        self,
        methods: Sequence[Method],
        weights: Path,
        folder: Path,
        module: Finetuner,
        data: MultipleChoiceDataModule,
    ) -> None:
        """Complete the fit of a folder to fine-tuned weights, with a module before fine-tuning."""
        callback = self._callback(methods, folder)
        # The callback first captures the weights from before fine-tuning; then the fine-tuned ones are loaded.
        trainer = self._trainer([callback, LoadTrained(weights)])
        callback.fit_posterior(module, trainer=trainer, datamodule=data)
        self._detach(module, data)

    def _unfitted(self, methods: Sequence[Method], folder: Path) -> list[str]:
        """The names of the methods that the fit of a folder lacks."""
        fit = self._fitted(folder) if is_rank_zero() else None
        missing = [m.name for m in methods if not agreed(fit is not None and fit.is_finished(m))]
        if not missing and is_rank_zero():
            for path in folder.glob("curvature_state-*"):  # of a process that was killed after the fit
                remove_tensor_file(path, format=PASS_FORMAT)
        return missing

    def _fitted(self, folder: Path) -> FitResult | None:
        """The fit of an earlier run; the index of a damaged one is removed, so that everything is fitted again."""
        if not has_fit(folder):
            return None
        try:
            return load_fit(folder)[0]
        except (ValueError, FileNotFoundError) as error:
            warnings.warn(f"{error} The methods are fitted again", stacklevel=2)
            (folder / INDEX_FILE).unlink()
            return None

    def _fresh(self, member: int) -> tuple[Finetuner, MultipleChoiceDataModule]:
        """A module before fine-tuning, and the DataModule with this member's training order."""
        L.seed_everything(self._seed_of(member), workers=True, verbose=False)
        data = self._data(member)
        return self._module(data), data

    def _seed_of(self, member: int) -> int:
        return 1000 * self.seed + member

    def _data(self, member: int) -> MultipleChoiceDataModule:
        return self.source.data(self._seed_of(member), self._padding_side, self._shared_prompts)

    def _module(self, data: MultipleChoiceDataModule) -> Finetuner:
        """A module before fine-tuning; all of them start from the same weights."""
        settings, model = self.settings, self._model()[0]
        common: dict[str, Any] = {
            "answer_token_ids": data.answer_token_ids,
            "learning_rate": settings.learning_rate,
            "weight_decay": settings.weight_decay,
            "schedule": settings.schedule,
            "half_precision_updates": settings.half_precision_updates,
        }
        if settings.train == "lora":
            return LoRAFinetuner(model, dropout=settings.expert_dropout, seed=self.seed, **common)
        return ExpertFinetuner(model, train=settings.train, expert_dropout=settings.expert_dropout, **common)

    def _detach(self, module: Finetuner, data: MultipleChoiceDataModule) -> None:
        """Free what a finished trainer holds: gradients, and the optimizer with its moments and copies of weights.

        Trainer, module and DataModule refer to one another, so without this they would be freed at any later time.
        """
        # What was given is not measured again, and prompts of another format tell nothing about sharing.
        self._padding_side = data.measured_padding_side or self._padding_side
        if data.measured_shared_prompts is not None and data.prompt_format.name == self.settings.prompt:
            self._shared_prompts = data.measured_shared_prompts
        module.trainer = None
        data.trainer = None
        module.zero_grad()
        gc.collect()

    def _trainer(self, callbacks: list[L.Callback], curves: str | None = None, **options: Any) -> L.Trainer:
        """A trainer; `curves` names its training curves, without which nothing is logged."""
        version = f"seed-{self.seed}-{curves}"
        if curves is not None and is_rank_zero():
            # TensorBoard would draw the events of a training that was killed beside those of this one.
            shutil.rmtree(self.output / _CURVES / version, ignore_errors=True)
        logger = curves is not None and TensorBoardLogger(
            self.output, name=_CURVES, version=version, default_hp_metric=False
        )
        return L.Trainer(
            max_epochs=self.settings.epochs,
            accelerator=self.settings.accelerator,
            precision=self.settings.precision,
            gradient_clip_val=1.0,
            callbacks=[StopAtSignal(), LoopProgressLines(), *callbacks],
            logger=logger,
            log_every_n_steps=10,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=not self.settings.quiet,
            # Nothing depends on the validation loss, so validate once, at the end.
            check_val_every_n_epoch=self.settings.epochs,
            num_sanity_val_steps=0,
            default_root_dir=str(self.output),
            **trainer_options(self.settings),
            **options,
        )

    def _say(self, what: str) -> None:
        if is_rank_zero():
            print(f"[seed {self.seed}] {what}", flush=True)
