"""The callback: fit a posterior when training ends, and predict with it from then on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from bmoe_lightning.curvature.fisher import FisherName
from bmoe_lightning.curvature.kfac import ApproximationName
from bmoe_lightning.curvature.sketch import SketchName
from bmoe_lightning.experts import ClassLogits
from bmoe_lightning.laplace.predictive import NUM_SAMPLES, LinkName
from bmoe_lightning.laplace.prior import Scope
from bmoe_lightning.methods.method import Predictions
from bmoe_lightning.methods.options import FactorDtype, FitSettings
from bmoe_lightning.methods.storage import CURVATURE_STATE_FILE, POSTERIOR_FILE, save_fitted
from bmoe_lightning.methods.workbench import Fitted, fit
from bmoe_lightning.trainer.checks import (
    check_calibration,
    check_later_callbacks,
    check_loaders,
    check_loss,
    check_prediction,
    check_prior_mean,
    check_shards,
    check_sketch,
    check_snapshots,
    check_strategy,
    is_trial,
)
from bmoe_lightning.trainer.data_passes import (
    DataPass,
    as_list,
    best_weights,
    reproducible_order,
    shards_weights,
    training_examples,
    training_pass,
    validation_pass,
)
from bmoe_lightning.trainer.evaluation import EvaluationRun, uncertain_prediction
from bmoe_lightning.trainer.prior_mean import PriorMean
from bmoe_lightning.trainer.run_folder import RunFiles, remove_curvature_state
from bmoe_lightning.trainer.sampler_shards import find_sampler_shard
from bmoe_lightning.utils.distributed import barrier, is_rank_zero


class BayesianMoECallback(L.Callback):
    """Fit a Laplace posterior over the experts when training ends; validate, test and predict with it afterwards.

    Works with any LightningModule that has `class_logits(batch) -> (logits [B, K], labels [B])`, or gets such a
    function as an argument. At the end of `trainer.fit` it runs one curvature epoch over the training data and one pass
    over the validation split, and writes `posterior.safetensors`. From then on every `trainer.validate` and
    `trainer.test` logs `{method}/{val|test}/{acc|ece|nll|brier}` for each method asked for, and `trainer.predict`
    returns probabilities with their uncertainty.

    On several processes of DDP each works on its share of the data. Sums and counts are added up, and examples that a
    distributed sampler repeats are left out, so all processes get the posterior and log the metrics of one process with
    all the data, to rounding; the first one writes. Drawn labels (`fisher="mc"`) and MC dropout give the same in
    distribution only. Caps and dropped last batches are of each process, as in Lightning. Where a strategy forks or
    spawns processes (`ddp_spawn`, `ddp_notebook`), what they fitted is found again through `dirpath`, which all of them
    and the calling one must see.

    Example:
        >>> trainer = L.Trainer(callbacks=[BayesianMoECallback()])    # doctest: +SKIP
        >>> trainer.fit(module, datamodule=data)                      # doctest: +SKIP
        >>> trainer.test(module, datamodule=data)                     # doctest: +SKIP

    Args:
        methods: which methods to fit and to log; names from `bmoe_lightning.methods.options.METHODS`.
        class_logits: `(module, batch) -> (logits [B, K], labels [B])`, if the module has no method of that name.
        rank: eigenpairs kept of each Kronecker factor.
        fisher: labels of the curvature: `exact`, `mc` or `empirical`.
        approximation: K-FAC `expand` or `reduce`.
        sketch: low-rank algorithm: `auto`, `nystrom`, `rsvd` or `exact`.
        evidence_scope: one prior precision a layer from the evidence (`layer`), or a single one (`global`).
        lpo_scope: the same for LPO.
        prior_mean: `pretrained` (the weights before fine-tuning) or `zero`.
        skip_layers: indices of expert layers that stay out of the posterior.
        link: `mc`, `isotropic`, `probit` or `laplace_bridge`.
        num_samples: Monte Carlo samples of a prediction.
        curvature_batches: cap on the training batches of the curvature epoch, of each process; the curvature is scaled
            up to the whole.
        curvature_checkpoint_every: write the running sums of the curvature epoch into the folder every so many batches,
            and remove them when the posterior is written. If the process is killed in between, `fit_posterior` with the
            trained weights and the same loader goes on from there, if the callback has that folder as its `dirpath`.
            None writes nothing.
        fit_at: fit at the `last` weights, or at the `best` of the trainer's checkpoint callback (then test with
            `ckpt_path="best"`; the module keeps its last weights).
        dropout: probability of MC dropout.
        dropout_samples: forward passes of MC dropout.
        num_snapshots: members of the checkpoint ensemble: the weights after each of the last epochs.
        ensemble_members: snapshot files of other seeds, for the deep ensemble.
        dirpath: folder for what is written; by default `bayesian_moe` in the logger's folder.
        name: prefix of logged names and of the folder, needed when a trainer has two of these callbacks.
        seed: of drawn labels, test matrices and noise.
        experts: shell-style pattern over module names, where experts are not found by structure.
        down_proj: name of the second linear layer within an expert, likewise.
        shared_experts: whether shared experts get a posterior too.
        linear_layers: pattern over the names of plain linear layers that get the posterior instead of the experts.
        factor_dtype: what the factors are kept and saved in, `float32` or `bfloat16`; computations are in float32.
        offload_factors: whether the factors stay in main memory, and come to the model's devices layer by layer.

    Raises:
        ValueError: for an unknown name or a value out of range.
    """

    def __init__(
        self,
        methods: Sequence[str] = ("map", "laplace_lpo"),
        class_logits: ClassLogits | None = None,
        rank: int = 10,
        fisher: FisherName = "exact",
        approximation: ApproximationName = "expand",
        sketch: SketchName = "auto",
        evidence_scope: Scope = "layer",
        lpo_scope: Scope = "layer",
        prior_mean: Literal["pretrained", "zero"] = "pretrained",
        skip_layers: Sequence[int] = (),
        link: LinkName = "mc",
        num_samples: int = NUM_SAMPLES,
        curvature_batches: int | None = None,
        curvature_checkpoint_every: int | None = None,
        fit_at: Literal["last", "best"] = "last",
        dropout: float = 0.1,
        dropout_samples: int = 10,
        num_snapshots: int = 5,
        ensemble_members: Sequence[str] = (),
        dirpath: str | None = None,
        name: str = "",
        seed: int = 0,
        experts: str | None = None,
        down_proj: str | None = None,
        shared_experts: bool = False,
        linear_layers: str | None = None,
        factor_dtype: FactorDtype = "float32",
        offload_factors: bool = False,
    ) -> None:
        self.settings = FitSettings(
            methods=tuple(methods),
            rank=rank,
            fisher=fisher,
            approximation=approximation,
            sketch=sketch,
            evidence_scope=evidence_scope,
            lpo_scope=lpo_scope,
            prior_mean=prior_mean,
            skip_layers=tuple(skip_layers),
            link=link,
            num_samples=num_samples,
            dropout=dropout,
            dropout_samples=dropout_samples,
            seed=seed,
            experts=experts,
            down_proj=down_proj,
            shared_experts=shared_experts,
            linear_layers=linear_layers,
            factor_dtype=factor_dtype,
            offload_factors=offload_factors,
        )
        if fit_at not in ("last", "best"):
            raise ValueError(f"fit_at must be 'last' or 'best', got {fit_at!r}")
        if curvature_batches is not None and curvature_batches < 1:
            raise ValueError(f"curvature_batches must be at least 1, got {curvature_batches}")
        if curvature_checkpoint_every is not None and curvature_checkpoint_every < 1:
            raise ValueError(f"curvature_checkpoint_every must be at least 1, got {curvature_checkpoint_every}")
        if "deep_ensemble" in self.settings.methods and not ensemble_members:
            raise ValueError("the deep ensemble needs ensemble_members: snapshot files of other seeds")
        if num_snapshots < 2 and "checkpoint_ensemble" in self.settings.methods:
            raise ValueError(f"a checkpoint ensemble needs at least 2 snapshots, got num_snapshots={num_snapshots}")
        self.curvature_batches = curvature_batches
        self.curvature_checkpoint_every = curvature_checkpoint_every
        self.fit_at = fit_at
        self.num_snapshots = num_snapshots
        self.ensemble_members = [str(member) for member in ensemble_members]
        self.name = name
        self.fitted: Fitted | None = None
        self.predictions: dict[str, dict[str, Predictions]] = {}
        self._class_logits = class_logits
        self._files = RunFiles(dirpath, self.settings)
        self._prior_mean = PriorMean(self.settings)
        self._precision: Callable[[], AbstractContextManager[Any]] = nullcontext
        self._undo: list[Callable[[], None]] = []
        self._run: EvaluationRun | None = None

    @property
    def state_key(self) -> str:
        """Callbacks with another name keep their own state."""
        return self._generate_state_key(name=self.name)

    # -- before anything runs

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what cannot work before time is spent; let evaluation loops keep gradients possible."""
        check_strategy(trainer)
        check_sketch(trainer, self.settings)
        if self.fit_at == "best" and shards_weights(trainer):
            raise ValueError(
                "fit_at='best' reads a checkpoint in one piece, and ModelParallelStrategy shards the weights; fit at "
                "the last ones, or load the best ones into one process and call fit_posterior"
            )
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        check_later_callbacks(callbacks[callbacks.index(self) + 1 :])
        if self._class_logits is None and not callable(getattr(pl_module, "class_logits", None)):
            raise TypeError(
                f"{type(pl_module).__name__} has no method class_logits(batch) -> (logits [B, K], labels [B]), and "
                "BayesianMoECallback got no class_logits argument; give it one of the two"
            )
        self._restore()
        # Inference tensors cannot enter a graph, and the linearised predictive needs one.
        for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
            self._undo.append(partial(setattr, loop, "inference_mode", loop.inference_mode))
            loop.inference_mode = False
        self._files.settle(trainer, self.name)
        self._precision = trainer.precision_plugin.forward_context
        # Sharded weights are remembered in parts, once there are parts; there a checkpoint is loaded after that.
        if stage == "fit" and not shards_weights(trainer):
            self._prior_mean.remember(pl_module)
            self._prior_mean.watch(trainer, pl_module)
            self._undo.append(self._prior_mean.unwatch)

    # -- training

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The model is complete now: find its experts, and remember where its weights start."""
        self._prior_mean.unwatch()
        check_shards(trainer, pl_module)
        layers = self.settings.find_layers(pl_module)
        unknown = set(self.settings.skip_layers) - {layer.index for layer in layers}
        if unknown:
            raise ValueError(f"skip_layers names {sorted(unknown)}, but the model has {len(layers)} expert layers")
        check_prior_mean(trainer, self.settings, known=self._prior_mean.is_of(pl_module))
        self._prior_mean.remember(pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Drop a posterior of earlier weights, and sums for one; check that the data allow fitting another one."""
        self.fitted = None
        self.predictions = {}
        self._files.begin_training(trainer)
        check_snapshots(trainer, self.settings, len(self._files.snapshots))
        if self.settings.needs_posterior:
            training_pass(trainer, "Curvature", self.curvature_batches)
        if self.settings.needs_calibration:
            check_calibration(self.settings, validation_pass(trainer, "Calibration"), trial=is_trial(trainer))
        if self.fit_at == "best" and getattr(trainer.checkpoint_callback, "monitor", None) is None:
            raise ValueError("fit_at='best' needs a ModelCheckpoint with monitor=..., and the trainer has none")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop at a NaN loss rather than after an hour of them."""
        check_loss(trainer, outputs, batch_idx)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the trained weights of the last epochs for the checkpoint ensemble."""
        if "checkpoint_ensemble" in self.settings.methods:
            self._files.keep_snapshot(trainer, pl_module, self.num_snapshots)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Fit everything, while the model is still on its device and the loaders are alive."""
        curvature = calibration = None
        if self.settings.needs_posterior:
            curvature = training_pass(trainer, "Curvature", self.curvature_batches)
        if self.settings.needs_calibration:
            calibration = validation_pass(trainer, "Calibration")
        with best_weights(trainer, pl_module) if self.fit_at == "best" else nullcontext():
            self._fit(
                pl_module,
                curvature or [],
                calibration,
                num_examples=training_examples(trainer) if self.curvature_batches is not None else None,
                distributed=trainer.world_size > 1,
                folder=self._files.folder,
            )
        folder = self._files.folder
        if folder is not None and trainer.is_global_zero:
            save_fitted(folder, self._require_fitted(), self._files.snapshots)
        trainer.strategy.barrier()  # nobody looks for files that are not there yet
        remove_curvature_state(folder)
        scalars = {f"{self._prefix}{name}": value for name, value in self._require_fitted().scalars().items()}
        for logger in trainer.loggers:  # self.log is not allowed in this hook
            logger.log_metrics(scalars, step=trainer.fit_loop.epoch_loop._batches_that_stepped)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say so if training was over before it began (a finished run was resumed), so that nothing was fitted."""
        if self._found() is None:
            warnings.warn(
                "training ended without a fitted posterior (was a finished run resumed?); call "
                "BayesianMoECallback.fit_posterior before testing",
                stacklevel=2,
            )

    def fit_posterior(
        self,
        module: nn.Module,
        curvature_batches: Iterable[Any],
        calibration_batches: Iterable[Any] | None = None,
        *,
        prior_mean: Mapping[str, Tensor] | None = None,
        num_examples: int | None = None,
        distributed: bool = False,
    ) -> None:
        """Fit on a model that is already trained; `trainer.test` and `trainer.predict` then use the result.

        What was fitted is also written, if the callback was given a `dirpath`. A curvature epoch that was killed there
        (see `curvature_checkpoint_every`) goes on; in another process a method with an evidence needs `prior_mean`,
        which the killed one had seen when training started. A shuffling DataLoader gives the order that it gave when
        training ended; around a call with a generator over one, put
        `with bmoe_lightning.trainer.data_passes.reproducible_order(loader)`.

        Args:
            module: the LightningModule (or whatever `class_logits` takes as its model), on its device.
            curvature_batches: batches of the training data, on the model's device.
            calibration_batches: batches of held-out data, for methods that need them.
            prior_mean: weights before fine-tuning by parameter name, for methods that use the evidence; by default
                those that this callback saw when training started.
            num_examples: examples that the curvature shall stand for, if `curvature_batches` is a part of the data.
            distributed: whether all processes of torch.distributed's group call this, each with its share of the data:
                of W processes, process r has the examples r, r + W, r + 2 W, ..., and none of them twice. Where weights
                are sharded, all need as many batches of the same sizes: then give examples once more at the end, in a
                `CountedBatch`. All get the same result, and the first one writes. Otherwise the process that calls this
                fits on the batches it gives and writes, by itself, however many processes there are.

        Raises:
            ValueError: if a method lacks data, labels or the prior mean, or the folder holds sums of a curvature epoch
                over other batches, or with other weights or options.
        """
        folder = self._files.given
        if self.curvature_checkpoint_every is not None and folder is None:
            warnings.warn(
                "curvature_checkpoint_every writes into the callback's dirpath, and none was given: what an earlier"
                " run may have left in its logger's folder is not gone on with",
                stacklevel=2,
            )
        loader = isinstance(curvature_batches, DataLoader)
        with reproducible_order(curvature_batches) if loader else nullcontext():
            self._fit(
                module,
                curvature_batches,
                calibration_batches,
                prior_mean=prior_mean,
                num_examples=num_examples,
                distributed=distributed,
                folder=folder,
            )
        if folder is not None and (is_rank_zero() or not distributed):
            save_fitted(folder, self._require_fitted(), self._files.snapshots)
        if distributed:
            barrier()
        remove_curvature_state(folder)

    def _fit(
        self,
        module: nn.Module,
        curvature_batches: Iterable[Any],
        calibration_batches: Iterable[Any] | None,
        *,
        prior_mean: Mapping[str, Tensor] | None = None,
        num_examples: int | None = None,
        distributed: bool = False,
        folder: Path | None,
    ) -> None:
        every = self.curvature_checkpoint_every
        self.fitted = fit(
            module,
            self._engine_logits,
            self.settings,
            curvature_batches,
            calibration_batches,
            prior_mean=self._prior_mean.weights if prior_mean is None else prior_mean,
            num_examples=num_examples,
            distributed=distributed,
            curvature_checkpoint=None if folder is None or every is None else folder / CURVATURE_STATE_FILE,
            curvature_checkpoint_every=every or 1,
        )

    # -- validation and test

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make the methods ready, unless this is a validation within training: nothing is fitted then."""
        if trainer.state.fn == "validate":
            self._begin(trainer, pl_module, "val", trainer.val_dataloaders)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make the methods ready; refuse a posterior of other weights."""
        self._begin(trainer, pl_module, "test", trainer.test_dataloaders)

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
        self._add_batch(trainer, pl_module, batch, dataloader_idx)

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let the ensembles predict, then log the metrics of every method."""
        self._finish(trainer, pl_module, trainer.val_dataloaders, trainer.num_val_batches)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let the ensembles predict, then log the metrics of every method and write the TensorBoard comparison."""
        self._finish(trainer, pl_module, trainer.test_dataloaders, trainer.num_test_batches)

    # -- prediction

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Replace the module's predict step by one that returns probabilities with their uncertainty."""
        check_prediction(trainer, as_list(trainer.predict_dataloaders))
        posterior = self._ready(pl_module).posterior
        if posterior is None:
            raise RuntimeError(f"none of the methods {list(self.settings.methods)} has a posterior to predict with")

        def predict_step(batch: Any, *_: Any) -> dict[str, Tensor]:
            return uncertain_prediction(posterior, pl_module, self._engine_logits, batch, self.settings)

        # On the instance, so that the class stays as it is.
        pl_module.predict_step = predict_step  # type: ignore[method-assign]
        self._undo.append(partial(delattr, pl_module, "predict_step"))

    # -- afterwards

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Put loops and module back as they were."""
        self._restore()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Put loops and module back as they were: after an exception, `teardown` is never called."""
        self._restore()

    def state_dict(self) -> dict[str, Any]:
        """A few numbers and a path; the factors are in a file of their own, not in every checkpoint."""
        return self._files.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember where the posterior was written."""
        self._files.load_state_dict(state_dict)

    # -- helpers, in the order in which they are used above

    def _engine_logits(self, model: Any, batch: Any) -> tuple[Tensor, Tensor | None]:
        with self._precision():
            found = model.class_logits(batch) if self._class_logits is None else self._class_logits(model, batch)
        if not isinstance(found, tuple) or len(found) != 2:
            raise TypeError(f"class_logits must return (logits, labels or None), got {type(found).__name__}")
        return found

    def _require_fitted(self) -> Fitted:
        if self.fitted is None:
            raise RuntimeError(
                "no fitted posterior: run trainer.fit with this callback, call fit_posterior, or give dirpath= the "
                f"folder with the {POSTERIOR_FILE} of an earlier run"
            )
        return self.fitted

    def _found(self) -> Fitted | None:
        """What was fitted, here or by an earlier process."""
        if self.fitted is None:
            self.fitted = self._files.load()
        return self.fitted

    def _ready(self, module: nn.Module) -> Fitted:
        """What was fitted for exactly these weights."""
        self._found()
        fitted = self._require_fitted()
        fitted.check_weights(module, self.settings)
        return fitted

    def _begin(self, trainer: L.Trainer, module: L.LightningModule, stage: str, loaders: Any) -> None:
        check_loaders(trainer, as_list(loaders))
        fitted = self._ready(module)
        self._run = EvaluationRun(stage, self.settings, fitted, self._files.snapshots, self.ensemble_members)

    def _add_batch(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, loader: int) -> None:
        if self._run is not None:
            self._run.add(module, self._engine_logits, batch, loader)

    def _finish(self, trainer: L.Trainer, module: L.LightningModule, loaders: Any, counts: Sequence[float]) -> None:
        if self._run is None:
            return
        run, self._run = self._run, None
        flat = as_list(loaders)
        passes = [
            DataPass(trainer, loader, int(n), "Ensembles", index, transient=True, repeats=True)
            for index, (loader, n) in enumerate(zip(flat, counts, strict=True))
        ]
        shares = [find_sampler_shard(trainer, loader, n) for loader, n in zip(flat, counts, strict=True)]
        self.predictions |= run.finish(module, self._engine_logits, passes, shares)
        metrics = {f"{self._prefix}{key}": value for key, value in run.metrics().items()}
        # The same on every process, which Lightning must be told; a maximum does not round, as a mean would.
        module.log_dict(metrics, reduce_fx="max", sync_dist=trainer.world_size > 1)
        if run.stage == "test" and not is_trial(trainer) and trainer.is_global_zero:
            folders = [logger.log_dir for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
            for folder in folders:
                run.write_tensorboard(Path(folder) / self.name, trainer.fit_loop.epoch_loop._batches_that_stepped)

    @property
    def _prefix(self) -> str:
        return f"{self.name}/" if self.name else ""

    def _restore(self) -> None:
        while self._undo:
            self._undo.pop()()
        self._run = None
