"""All stages of one fine-tuning seed: training, fits and evaluation.

Each stage writes a file atomically; a stage whose file exists is not repeated. For a method that is added to a finished
run, only that method is fitted and evaluated.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import lightning as L
from torch import Tensor

from bmoe_lightning import BayesianMoECallback, MultipleChoiceDataModule
from bmoe_lightning.base_finetuner import Finetuner
from bmoe_lightning.data import Question
from bmoe_lightning.laplace.posterior import WeightMismatchError
from bmoe_lightning.methods import DataMismatchError, FitResult, Method
from bmoe_lightning.methods.fit_index import INDEX_FILE, stored_snapshots
from bmoe_lightning.report import MethodResult
from bmoe_lightning.trainer.fit_only import fit_only
from bmoe_lightning.trainer.prior_mean import PriorMean
from bmoe_lightning.utils.distributed import barrier, is_rank_zero
from recipes.qwen_obqa.distributed import agreed, first_then_others
from recipes.qwen_obqa.exported_model import check_origin, export, export_folder, is_exported
from recipes.qwen_obqa.further_runs import FurtherRuns, is_finished
from recipes.qwen_obqa.run_folder import FIT_FOLDER, MEMBER_FITS, check_files, check_pretrained, fingerprint_of
from recipes.qwen_obqa.seed_training import SeedTraining
from recipes.qwen_obqa.served_model import lacks_manifest, write_manifest
from recipes.qwen_obqa.settings import ResolvedSettings
from recipes.qwen_obqa.sources import Source
from recipes.qwen_obqa.stored_predictions import StoredPredictions
from recipes.qwen_obqa.stored_weights import LoadTrained, SaveTrained, has_weights, keeps_weights
from recipes.qwen_obqa.zero_shot import ZERO_SHOT, predict_zero_shot


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
    _model_checked: bool = field(default=False, init=False, repr=False)

    @cached_property
    def _training(self) -> SeedTraining:
        return SeedTraining(self.settings, self.source, self.output, self.seed, self.identity)

    @cached_property
    def _further(self) -> FurtherRuns:
        return FurtherRuns(self._training)

    @property
    def folder(self) -> Path:
        """Folder of this seed's files."""
        return self._training.folder

    @property
    def fit_folder(self) -> Path:
        """Folder of this seed's fit."""
        return self.folder / FIT_FOLDER

    @property
    def trained_weights(self) -> Path:
        """The file of this seed's fine-tuned weights."""
        return self._training.weights(0)

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
        if not missing and not agreed(is_rank_zero() and self._training.fitted(self.fit_folder) is not None):
            missing = list(self.methods)  # the report reads the fit, which is damaged or lost
        if not missing and agreed(is_rank_zero() and lacks_manifest(self._training)):
            missing = [self.methods[0]]  # how questions are asked is known after an evaluation
        zero_shot = self.settings.zero_shot and not agreed(self.zero_shot_predictions.has(ZERO_SHOT))
        if missing or zero_shot:
            self._check_model()
        if zero_shot:
            self._evaluate_zero_shot()
        if missing:
            self._complete_methods(missing)
        for other in self.source.others:
            stored = self.predictions_of(other)
            if missing := [method for method in self.methods if not agreed(stored.has(method))]:
                self._check_model()
                self._evaluate_other(missing, other)
        folder = export_folder(self.settings, self.seed)
        if folder is not None:
            self._save_model(folder)

    def _check_model(self) -> None:
        """Refuse another model than the finished stages were made with, before it is loaded for the first time."""
        if self._model_checked:
            return
        self._model_checked = True
        model, weights = self._training.model()
        if weights:
            self._training.say(f"pre-trained weights {weights}")
            first_then_others(lambda: check_pretrained(self.output, self.seed, weights))
        else:
            first_then_others(lambda: check_files(self.output, self.seed, model))

    def check_export(self) -> None:
        """Refuse another run's model in the folder of this seed's; see `check_origin`."""
        folder = export_folder(self.settings, self.seed)
        if folder is not None:
            check_origin(folder, self.trained_weights, self._training.stage(0))

    def lost_of(self, method: Method, keeps: Callable[[Path, str], bool] = keeps_weights) -> str | None:
        """What a method is fitted to or predicts with that is not stored or damaged, in words; None if it is all there.

        Files are only read.

        Args:
            method: Method, as the run's settings have it.
            keeps: `keeps_weights`, or a function that remembers what this has found.
        """
        training, runs = self._training, range(1, method.needs.runs + 1)
        if not all(keeps(training.weights(index), training.stage(index)) for index in (0, *runs)):
            return "fine-tuned weights"
        if not all(is_finished(method.needs.run_methods, self._further.fit_folder(index)) for index in runs):
            return "fits to further fine-tuned weights"
        snapshots = [path for path in stored_snapshots(self.fit_folder) if path.is_file()]
        return "weights after the last epochs" if len(snapshots) < method.needs.snapshots else None

    def with_stored_runs(self, method: Method) -> Method:
        """The method with the files of the further fine-tuning runs that it needs, where these are; none is made."""
        return self._further.stored(method)

    def with_trained(self, action: Callable[[L.Trainer, Finetuner, Mapping[str, Tensor] | None], None]) -> None:
        """Run an action with the fine-tuned module, which is stored, in a trainer that is set up as for training.

        No training step runs, and no file is written.

        Args:
            action: Function of the trainer, the module on its device, and the weights from before fine-tuning if a
                method uses them.
        """
        module, data = self._training.fresh(0)
        prior_mean = PriorMean(self.methods)
        load = LoadTrained(self.trained_weights, before=prior_mean.capture)

        def run(trainer: L.Trainer, trained: L.LightningModule) -> None:
            assert isinstance(trained, Finetuner)
            action(trainer, trained, prior_mean.weights)

        try:
            fit_only(self._training.trainer([load]), load, module, run, datamodule=data)
        finally:
            self._training.detach(module, data)

    def _evaluate_zero_shot(self) -> None:
        self._training.say("evaluating the model before fine-tuning")
        module, data = self._training.fresh(0)
        callback = BayesianMoECallback(methods=[ZERO_SHOT], seed=self.seed)
        predictions = predict_zero_shot(callback, self._training.trainer([callback]), module, data)
        self._training.detach(module, data)
        if is_rank_zero():
            self.zero_shot_predictions.write(ZERO_SHOT, FitResult(seed=self.seed), predictions)
        barrier()

    def _save_model(self, folder: Path) -> None:
        """Write the fine-tuned model for transformers, unless an earlier run has."""
        if not agreed(has_weights(self.trained_weights, self._training.stage(0))):
            self._check_model()
            methods = [self._further.completed(method) for method in self.methods]
            self._train_and_fit(*self._training.fresh(0), methods)
        if agreed(first_then_others(lambda: is_rank_zero() and is_exported(folder, self.trained_weights))):
            return
        self._check_model()
        self._training.say(f"saving the fine-tuned model in {folder}")
        module, trainer = self._training.fresh(0)[0], self._training.trainer([])

        def write() -> None:
            if is_rank_zero():
                export(folder, self.trained_weights, module, trainer, self.source.tokenizer)

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
        methods = [self._further.completed(method) for method in self.methods]
        module, data = self._training.fresh(0)
        self._train_and_fit(module, data, methods)
        names = ", ".join(method.name for method in missing)
        self._training.say("evaluating" if len(missing) == len(self.methods) else f"evaluating {names}")
        self._evaluate(missing, module, data, self.predictions)

        def write() -> None:
            if is_rank_zero():
                results = self._read(self.predictions, self.source.test)
                write_manifest(self._training, module, methods, data, results)

        first_then_others(write)

    def _evaluate_other(self, missing: Sequence[Method], other: str) -> None:
        self._training.say(f"evaluating on {other}")
        data = self._training.other_data(other)
        self._evaluate(missing, self._training.module(data), data, self.predictions_of(other))

    def _evaluate(
        self,
        missing: Sequence[Method],
        module: Finetuner,
        data: MultipleChoiceDataModule,
        stored: StoredPredictions,
    ) -> None:
        """Predict the test split of a DataModule with fitted methods."""
        # A new callback, so that the evaluation uses the files of the fit.
        callback = self._training.callback([self._further.completed(method) for method in missing], self.fit_folder)
        load = LoadTrained(self.trained_weights)
        self._training.trainer([load, callback]).test(module, datamodule=data, verbose=False)
        self._training.detach(module, data)
        if is_rank_zero():
            assert callback.fitted is not None
            for method in missing:
                stored.write(method, callback.fitted, callback.predictions["test"][method.name])
        barrier()

    def _train_and_fit(self, module: Finetuner, data: MultipleChoiceDataModule, methods: Sequence[Method]) -> None:
        """Fine-tune the module and fit the methods, unless an earlier run has."""
        training = self._training
        if not agreed(has_weights(self.trained_weights, training.stage(0))):
            if is_rank_zero() and self.fit_folder.is_dir():
                shutil.rmtree(self.fit_folder)  # of a training that was killed, or of weights that are trained again
            trained = "LoRA's matrices" if self.settings.train == "lora" else "the experts"
            training.say(f"fine-tuning {trained}, then curvature and calibration")
            save = SaveTrained(self.trained_weights, training.stage(0))
            callback = training.callback(methods, self.fit_folder)
            training.trainer([save, callback], "training").fit(module, datamodule=data)
            training.detach(module, data)
        elif missing := training.unfitted(methods, self.fit_folder):
            training.say(f"fitting {', '.join(missing)} to the fine-tuned weights")
            training.fit(methods, self.trained_weights, self.fit_folder, module, data)
