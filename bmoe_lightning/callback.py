"""The Lightning callback: fits methods when training ends, and evaluates and predicts with them afterwards."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
from torch import Tensor, nn

from bmoe_lightning.curvature.spec import Curvature
from bmoe_lightning.experts import ClassLogits
from bmoe_lightning.methods.base import Method, check_choice, check_method_names
from bmoe_lightning.methods.evaluation import Predictions, Predictor
from bmoe_lightning.methods.fit_result import FitResult
from bmoe_lightning.methods.fitting import fingerprinted_layers
from bmoe_lightning.methods.needs import Available, check_needs
from bmoe_lightning.methods.registry import get_method
from bmoe_lightning.trainer.checkpoints import check_best_so_far, weights_to_fit
from bmoe_lightning.trainer.checks import (
    check_loaders,
    check_prediction,
    check_setup,
    check_shards,
    check_training,
    is_trial,
    with_enough_snapshots,
)
from bmoe_lightning.trainer.data_passes import as_list
from bmoe_lightning.trainer.evaluation import EvaluationRun, log_scalars, without_fit
from bmoe_lightning.trainer.first_batches import FirstBatches, no_logging
from bmoe_lightning.trainer.fit_only import fit_only
from bmoe_lightning.trainer.lightning_internals import call_after_fit_loop, is_restoring_checkpoint
from bmoe_lightning.trainer.loaders import evaluation_loaders
from bmoe_lightning.trainer.moved_weights import watch_moved_weights
from bmoe_lightning.trainer.predict_step import predicted, replace_predict_step
from bmoe_lightning.trainer.prior_mean import PriorMean
from bmoe_lightning.trainer.run_fit import check_completion, fit_run
from bmoe_lightning.trainer.run_folder import RunFolder
from bmoe_lightning.utils.distributed import together


class BayesianMoECallback(L.Callback):
    """Fit a Laplace posterior over the experts when training ends; validate, test and predict with it afterwards.

    Works with any LightningModule that has `class_logits(batch) -> (logits [B, K], labels [B])`, or gets such a
    function as an argument. At the end of `trainer.fit` it runs one curvature epoch over the training data and one pass
    over the validation split, and writes `posterior.safetensors`. From then on every `trainer.validate` and
    `trainer.test` logs `{method}/{val|test}/{acc|ece|nll|brier}` for each method.

    Under DDP and FSDP2 each process works on its shard of the data. Sums and counts are all-reduced, and examples that
    a distributed sampler repeats are left out, so all ranks get the posterior and log the metrics of one process with
    all the data, to rounding; rank 0 writes. Sampled labels (`fisher="mc"`) and MC dropout agree in distribution only.

    Examples:
        >>> trainer = L.Trainer(callbacks=[BayesianMoECallback()])    # doctest: +SKIP
        >>> trainer.fit(module, datamodule=data)                      # doctest: +SKIP
        >>> trainer.test(module, datamodule=data)                     # doctest: +SKIP

    Args:
        methods: Methods to fit and to log: registered names, `package.module:Class`, or configured instances. A class
            may occur twice under two names. By default the model itself, the temperature that lost least on small
            calibration splits (docs/reading_the_results.md), and the posterior, which has a covariance for each input.
        curvature: Curvature of methods that specify none.
        class_logits: Function `(module, batch) -> (logits [B, K], labels [B])`, if the module has no such method.
        fit_at: Weights that methods are fitted to: the `last`, or the `best` of the trainer's checkpoint callback (then
            test with `ckpt_path="best"`; the module keeps its last weights).
        predict_method: Name of the method that `trainer.predict` predicts with; its output then has the probabilities
            beside what the module's `predict_step` returned. None leaves `predict_step` unchanged.
        curvature_checkpoint_every: Number of batches between two checkpoints of a curvature pass; a killed pass resumes
            from its last checkpoint in `fit_posterior`. None writes no checkpoints.
        dirpath: Output folder; by default `bayesian_moe` in the logger's folder.
        name: Prefix of logged names and of the folder, required when a trainer has two of these callbacks.
        seed: Seed for sampled labels, sketch matrices and Monte Carlo noise.

    Attributes:
        methods: Methods with the run's curvature filled in.
        fitted: Result of the fit, or None.
        predictions: Predictions of the last validation and test, by loader and method.

    Raises:
        ValueError: If a method is unknown, two methods share a name, or a value is out of range.
    """

    def __init__(
        self,
        methods: Sequence[str | Method] = ("map", "shrunk_temperature", "laplace_lpo"),
        curvature: Curvature | None = None,
        class_logits: ClassLogits | None = None,
        fit_at: Literal["last", "best"] = "last",
        predict_method: str | None = None,
        curvature_checkpoint_every: int | None = None,
        dirpath: str | None = None,
        name: str = "",
        seed: int = 0,
    ) -> None:
        self.methods = tuple(get_method(method).with_defaults(curvature or Curvature()) for method in methods)
        check_method_names(self.methods)
        check_choice("fit_at", fit_at, ("last", "best"))
        if curvature_checkpoint_every is not None and curvature_checkpoint_every < 1:
            raise ValueError(f"curvature_checkpoint_every must be at least 1, got {curvature_checkpoint_every}")
        if predict_method is not None:
            check_choice("predict_method", predict_method, [method.name for method in self.methods])
        check_needs(self.methods, Available())
        self.fit_at = fit_at
        self.predict_method = predict_method
        self.name = name
        self.seed = seed
        self.fitted: FitResult | None = None
        self.predictions: dict[str, dict[str, Predictions]] = {}
        self._class_logits = class_logits
        self._num_snapshots = max(method.needs.max_snapshots for method in self.methods)
        self._folder = RunFolder(dirpath, curvature_checkpoint_every, name)
        self._prior_mean = PriorMean(self.methods)
        self._precision: Callable[[], AbstractContextManager[Any]] = nullcontext
        self._undo: list[Callable[[], None]] = []
        self._run: EvaluationRun | None = None
        self._first: FirstBatches | None = None

    @property
    def state_key(self) -> str:
        """Key of this callback's state in a checkpoint; it differs between callbacks of different names."""
        return self._generate_state_key(name=self.name)

    @property
    def curvatures(self) -> dict[str, Curvature]:
        """Curvatures of all methods, by digest."""
        return {curvature.digest: curvature for method in self.methods for curvature in method.curvatures}

    @property
    def snapshots(self) -> tuple[Path, ...]:
        """Snapshots of the trained weights that the fit has."""
        return tuple(self._folder.snapshots)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check trainer and module before any work is done, and turn off `inference_mode` of the evaluation loops."""
        check_setup(trainer, pl_module, self, self.curvatures.values(), self.fit_at, self._class_logits)
        self._restore()
        self._undo.append(self._folder.release)
        # Inference tensors cannot enter a graph, and the linearised predictive needs one.
        for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
            self._undo.append(partial(setattr, loop, "inference_mode", loop.inference_mode))
            loop.inference_mode = False
        self._folder.settle(trainer)
        self._precision = trainer.precision_plugin.forward_context
        if stage == "fit":
            self._prior_mean.setup(trainer, pl_module)
            self._undo.append(self._prior_mean.remove_hook)
            self._undo.append(call_after_fit_loop(trainer, self, partial(self._complete_resumed, trainer, pl_module)))

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Record that training resumes, so that the snapshots of the resumed run are used."""
        if not self._folder.has_saved(checkpoint["callbacks"].get(self.state_key)):
            self._folder.load_checkpoint(trainer)
            self._prior_mean.begin_loading()

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Capture the prior mean, if another callback saves the run before `on_fit_start`, as tuners do."""
        self._prior_mean.capture_before_saving(pl_module)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the layers of the complete model, and capture the prior mean."""
        self._prior_mean.remove_hook()
        check_shards(trainer, pl_module)
        fingerprinted_layers(self.methods, pl_module)
        for curvature in self.curvatures.values():
            curvature.find_layers(pl_module)
        known = self._prior_mean.is_known(pl_module)
        check_needs(self.methods, Available(prior_mean=known or not is_restoring_checkpoint(trainer)))
        self._prior_mean.capture(pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Discard a fit to earlier weights, and check that data and folder allow a new one."""
        self.fitted = None
        self.predictions = {}
        self._prior_mean.check(trainer, pl_module, self.methods, trains=True)
        self._folder.begin_training(trainer, self._num_snapshots)
        self._undo.append(watch_moved_weights(trainer))
        check_training(trainer, pl_module, self.methods, self.fit_at, self._folder.folder, len(self._folder.snapshots))
        self._first = FirstBatches(self.methods, self._logits)
        self._first.check_fit(trainer, pl_module)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check that the best checkpoint so far can be loaded when training ends."""
        if self.fit_at == "best":
            together(partial(check_best_so_far, trainer), distributed=trainer.world_size > 1)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, *_: Any) -> None:
        """Check `class_logits` on the first training batch, before the first step."""
        if self._first is not None:
            self._first.check(trainer, pl_module, batch, "training")

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write a snapshot of the trained weights, if a method needs snapshots."""
        if self._num_snapshots:
            self._folder.save_snapshot(trainer, pl_module, self._num_snapshots)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Fit all methods, while the model is still on its device and the loaders still exist."""
        with weights_to_fit(trainer, pl_module, self.fit_at):
            self._folder.begin_fit(trainer, pl_module)
            self._fit(trainer, pl_module, with_enough_snapshots(self.methods, len(self._folder.snapshots)))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Warn if nothing was fitted because no training step ran (a finished run was resumed)."""
        if self.fitted is None and not self._folder.has_any_fit(trainer):
            warnings.warn("training ended without a fit (was it a resumed one?); call fit_posterior", stacklevel=2)

    def fit_posterior(
        self,
        module: L.LightningModule | None = None,
        *,
        trainer: L.Trainer,
        datamodule: L.LightningDataModule | None = None,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        ckpt_path: str | None = None,
        prior_mean: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Fit all methods to a model that is already trained, as the end of training would.

        A killed curvature pass resumes (see `curvature_checkpoint_every`). A fit to the same weights that is already in
        the folder is completed: missing methods are fitted, so one can be added to a finished run, with the same data.

        Args:
            module: LightningModule; by default the one attached to the trainer.
            trainer: Trainer configured as for training, with any devices, DDP or FSDP2. It runs no training step.
            datamodule: Datamodule, as for `trainer.fit`.
            train_dataloaders: Training data, as for `trainer.fit`.
            val_dataloaders: Validation data, as for `trainer.fit`.
            ckpt_path: Checkpoint with the trained weights; the module's weights before it is loaded are the prior mean.
                By default the module already has the trained weights.
            prior_mean: Pretrained weights by parameter name (see `down_proj_weights`), for methods that use the
                evidence; by default those that this callback captured before training or before loading `ckpt_path`.

        Raises:
            ValueError: If data, labels or the prior mean that a method needs are missing, or a file is damaged.
            DataMismatchError, WeightMismatchError: If the folder has a fit or snapshots of other data or weights.
        """
        data = {"train_dataloaders": train_dataloaders, "val_dataloaders": val_dataloaders}
        with self._prior_mean.given(prior_mean):
            fit_only(trainer, self, module, self._complete, datamodule=datamodule, ckpt_path=ckpt_path, **data)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Load and check the fit, once other callbacks have swapped weights; not for a validation within training."""
        if trainer.state.fn == "validate":
            self._begin(trainer, pl_module, "val", trainer.validate_loop)

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Load and check the fit; raises `WeightMismatchError` if it was fitted to different weights."""
        self._begin(trainer, pl_module, "test", trainer.test_loop)

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Copy the batch's containers before the module's step consumes them."""
        if self._run is not None:
            self._run.receive(batch, pl_module if self._class_logits is None else None)
        elif self._first is not None and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._first.check(trainer, pl_module, batch, "validation", dataloader_idx)

    on_test_batch_start = on_validation_batch_start

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Predict the batch with every single-member method."""
        if self._run is not None:
            self._run.add(pl_module, self._logits, batch, dataloader_idx)

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Predict with the ensembles, then log the metrics of every method."""
        if self._first is not None:
            self._first.end_validation()
        self._finish(trainer, pl_module, trainer.validate_loop)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Predict with the ensembles, then log the metrics of every method and write the TensorBoard comparison."""
        self._finish(trainer, pl_module, trainer.test_loop)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Patch the module's `predict_step` to return the probabilities of `predict_method` as well."""
        if self.predict_method is None:
            return
        check_prediction(trainer, as_list(trainer.predict_dataloaders))
        method = next(method for method in self.methods if method.name == self.predict_method)
        predictor = Predictor(method, self._ready(trainer, pl_module), self._folder.snapshots)
        prediction = partial(predicted, predictor, pl_module, self._logits)
        self._undo.append(replace_predict_step(trainer, pl_module, prediction))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Restore loops and module."""
        self._restore()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Restore loops and module: Lightning does not call `teardown` after an exception."""
        self._restore()
        self._folder.stop(trainer, pl_module, exception)

    def state_dict(self) -> dict[str, Any]:
        """Folder, fit id, snapshot names and digests; tensors are in separate files, not in every checkpoint."""
        return self._folder.state_dict() | self._prior_mean.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the location of the fit, and what is known of the weights from before training."""
        if not self._folder.has_saved(state_dict):
            self._folder.load_state_dict(state_dict)
            self._prior_mean.load_state_dict(state_dict)

    def _fit(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        methods: Sequence[Method],
        earlier: FitResult | None = None,
    ) -> None:
        options: dict[str, Any] = {"prior_mean": self._prior_mean.used, "earlier": earlier, "seed": self.seed}
        self.fitted = fit_run(trainer, module, methods or self.methods, self._logits, self._folder, **options)
        self._folder.save(trainer, self.fitted)
        self._folder.remove_pass_files()
        log_scalars(trainer, self.fitted.scalars(self.methods), self.name)

    def _complete(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Fit the missing methods; runs instead of the fit loop."""
        with weights_to_fit(trainer, module, self.fit_at):
            earlier = self._found(trainer, module)
            self._folder.begin_completion(trainer, module, earlier, self._num_snapshots)
            missing = [method for method in self.methods if earlier is None or not earlier.is_finished(method)]
            self._prior_mean.check(trainer, module, missing, trains=False)
            check_completion(trainer, module, missing, self._logits, self._folder, is_new=earlier is None)
            self._fit(trainer, module, self.methods, earlier)

    def _complete_resumed(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Fit the methods after a resumed training that was already complete, unless it has a fit."""
        if self._folder.resumes and trainer.train_dataloader is not None and trainer.num_training_batches:
            with weights_to_fit(trainer, module, self.fit_at):
                needs_fit = self._found(trainer, module) is None and self._folder.ended_without_fit(trainer, module)
            if needs_fit:
                self._complete(trainer, module)
            elif self.fitted is not None:  # by a process that may have been killed once it had written the fit
                self._folder.remove_pass_files()
        self._folder.resumes = False

    def _logits(self, model: Any, batch: Any) -> tuple[Tensor, Tensor | None]:
        with self._precision(), no_logging(model):
            return model.class_logits(batch) if self._class_logits is None else self._class_logits(model, batch)

    def _found(self, trainer: L.Trainer, module: nn.Module) -> FitResult | None:
        """The fit to the module's weights of this process, or the one that an earlier process wrote."""
        if self.fitted is not None and self.fitted.has_weights_of(module):
            return self.fitted
        found = self._folder.load(trainer, module, [digest for digest, c in self.curvatures.items() if c.offload])
        self.fitted = found or self.fitted
        return found

    def _ready(self, trainer: L.Trainer, module: nn.Module) -> FitResult:
        """The fit, checked to be one to exactly these weights."""
        fitted = self._found(trainer, module) or self.fitted
        if fitted is None:
            raise self._folder.missing_fit()
        fitted.check_weights(module)
        return fitted

    def _begin(self, trainer: L.Trainer, module: L.LightningModule, stage: str, loop: Any) -> None:
        # Those of an earlier run over other data must not stand beside, or for, those of this one.
        self.predictions = {k: found for k, found in self.predictions.items() if k.partition("_")[0] != stage}
        loaders, _ = evaluation_loaders(loop)
        baseline = stage == "val" and self.fitted is None and self._found(trainer, module) is None
        if baseline and not self._folder.has_unreadable_fit():
            methods, fitted = without_fit(self.methods, self.seed, self._folder.missing_fit())
        else:
            fitted = self._ready(trainer, module)
            methods = [method for method in self.methods if not is_trial(trainer) or fitted.is_fitted(method)]
        check_loaders(trainer, loaders, methods)
        FirstBatches(methods, self._logits).check_evaluation(trainer, module, stage, loaders)
        self._run = EvaluationRun(stage, methods, fitted, self._folder.snapshots)
        self._run.check_members(trainer, module)

    def _finish(self, trainer: L.Trainer, module: L.LightningModule, loop: Any) -> None:
        run, self._run = self._run, None
        if run is not None:
            self.predictions |= run.finish_loaders(trainer, module, self._logits, *evaluation_loaders(loop))
            run.log(trainer, module, self.name)

    def _restore(self) -> None:
        while self._undo:
            self._undo.pop()()
        self._run = self._first = None
