"""One `trainer.validate` or `trainer.test` run of the callback: predictions, metrics and TensorBoard."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

from bmoe_lightning.experts import ClassLogits
from bmoe_lightning.experts.batch_copies import WriteCheck, copied_containers
from bmoe_lightning.experts.fsdp import runs_in_lockstep
from bmoe_lightning.experts.logits_contract import joined_logits
from bmoe_lightning.laplace.posterior import WeightMismatchError
from bmoe_lightning.methods.base import Method
from bmoe_lightning.methods.evaluation import Evaluation, Predictions
from bmoe_lightning.methods.fit_result import FitResult
from bmoe_lightning.methods.options import option_columns
from bmoe_lightning.metrics import calibration_values
from bmoe_lightning.report import MethodResult, has_comparison, results_table, summarise, write_tensorboard
from bmoe_lightning.trainer.checks import is_trial
from bmoe_lightning.trainer.data_passes import DataPass
from bmoe_lightning.trainer.lightning_internals import logged_step
from bmoe_lightning.trainer.logged_figures import FigureWriter, figure_writers, log_figures
from bmoe_lightning.trainer.sampler_shards import SamplerShard, find_sampler_shard
from bmoe_lightning.trainer.shared_logits import shared_logits
from bmoe_lightning.utils.distributed import failing_together, gather_number


def without_fit(methods: Sequence[Method], seed: int, reason: Exception) -> tuple[list[Method], FitResult]:
    """The methods that can be evaluated before anything was fitted to the weights, and a fit of nothing.

    Args:
        methods: Methods of a run.
        seed: Seed for the noise of predictions.
        reason: The error that says which folders have no fit.

    Raises:
        RuntimeError: The reason, if all methods need a fit.

    Warns:
        UserWarning: If some do; the message names them.
    """
    fitted = FitResult(seed=seed)
    ready = [method for method in methods if fitted.is_fitted(method) and not method.needs.snapshots]
    missing = [method.name for method in methods if method not in ready]
    if not ready:
        raise reason
    if missing:
        warnings.warn(
            f"nothing has been fitted to these weights, so {', '.join(missing)} are not evaluated in this validation: "
            f"{reason}",
            stacklevel=2,
        )
    return ready, fitted


class EvaluationRun:
    """Predictions of every method on every loader of one run.

    Args:
        stage: Stage in logged names, `val` or `test`.
        methods: Methods that predict.
        fitted: What they were fitted to.
        snapshots: Trained weights after the last epochs.

    Raises:
        NotFittedError: If a method has not been fitted, or was fitted with other options.
    """

    def __init__(self, stage: str, methods: Sequence[Method], fitted: FitResult, snapshots: Sequence[Path]) -> None:
        self.stage = stage
        self._methods = tuple(methods)
        for method in methods:
            fitted.state_of(method)  # raises before anything is predicted
        self._fitted = fitted
        self._snapshots = tuple(snapshots)
        self._evaluations: dict[int, Evaluation] = {}
        self._predictions: dict[str, dict[str, Predictions]] = {}
        self._names: dict[int, str] = {}  # of the loaders that had a batch
        self._received: tuple[Any, Any, WriteCheck] | None = None

    def receive(self, batch: Any, sharing: nn.Module | None = None) -> None:
        """Copy the containers of a batch before the module's step, which may consume them.

        Args:
            batch: The batch.
            sharing: The module, if its step may take the logits of `add`, which are those of its own `class_logits`.
        """
        self._received = batch, copied_containers(batch), WriteCheck(batch, synchronise=True)
        shared = None if sharing is None else shared_logits(sharing)
        if shared is not None:
            shared.announce(batch)

    def check_members(self, trainer: L.Trainer, module: nn.Module) -> None:
        """Check before the first batch that the members of every ensemble can be set up. A collective."""
        with failing_together(distributed=trainer.world_size > 1):
            Evaluation(self._methods, self._fitted, self._snapshots).check_members(module)

    def add(self, module: nn.Module, class_logits: ClassLogits, batch: Any, loader: int) -> None:
        """Predict one batch of a loader with every single-member method.

        Args:
            module: The model.
            class_logits: Function `(module, batch) -> (logits [B, K], labels [B])`.
            batch: The batch, which `receive` may have got before the module's step.
            loader: Index of the loader.

        Raises:
            RuntimeError: If the step has written to a tensor of the batch.
        """
        with failing_together(distributed=runs_in_lockstep(module)):
            self._add(module, class_logits, batch, loader)

    def _add(self, module: nn.Module, class_logits: ClassLogits, batch: Any, loader: int) -> None:
        received, self._received = self._received, None
        if received is not None and received[0] is batch:  # with a step that draws its batches itself it is another one
            _, batch, writes = received
            writes.check(f"the module's {'validation' if self.stage == 'val' else self.stage}_step")
        if loader not in self._evaluations:
            self._evaluations[loader] = Evaluation(self._methods, self._fitted, self._snapshots)
        logits, labels = self._evaluations[loader].add(module, class_logits, batch)
        shared = shared_logits(module)
        if shared is not None:
            shared.give(logits, labels.to(logits.device))

    def finish(
        self,
        module: nn.Module,
        class_logits: ClassLogits,
        passes: Sequence[Iterable[Any]],
        shards: Sequence[SamplerShard | None] | None = None,
    ) -> dict[str, dict[str, Predictions]]:
        """Predict with the ensembles, and return all predictions by loader (`test`, or `test_0`, ...) and method.

        Args:
            module: The model.
            class_logits: Function as in `add`.
            passes: Re-iterable batches of each loader, as in `add`.
            shards: This rank's shard of each loader if there are several ranks. Then this is a collective, and every
                rank gets all predictions.

        Raises:
            WeightMismatchError: If another callback has changed the weights since `add`, and there are ensembles.
        """
        ensembles = [method.name for method in self._methods if method.is_ensemble]
        if ensembles and self._evaluations and not self._fitted.has_weights_of(module):
            raise WeightMismatchError(
                f"another callback has changed the weights before the members of {', '.join(ensembles)} could be "
                "evaluated; put it after BayesianMoECallback, or use a trainer without it"
            )
        if shards is not None:
            self._check_shares(shards)
        for loader, evaluation in sorted(self._evaluations.items()):
            name = self.stage if len(passes) == 1 else f"{self.stage}_{loader}"
            self._names[loader] = name
            shard = None if shards is None else shards[loader]
            with failing_together(distributed=shard is not None):
                found = evaluation.finish(module, class_logits, passes[loader])
            if shard is not None:
                found = {method: _gathered(predictions, shard) for method, predictions in found.items()}
            self._predictions[name] = found
        return self._predictions

    def _check_shares(self, shards: Sequence[SamplerShard | None]) -> None:
        """Check that all ranks have examples of the same loaders. A collective."""
        for loader, shard in enumerate(shards):
            if shard is None:
                continue
            having = gather_number(int(loader in self._evaluations))
            if any(having) and not all(having):
                raise ValueError(
                    f"{sum(having)} of {len(having)} processes have examples of the {self.stage} data (loader "
                    f"{loader}) and the others have none; use fewer processes, or more examples"
                )

    def finish_loaders(
        self,
        trainer: L.Trainer,
        module: nn.Module,
        class_logits: ClassLogits,
        loaders: Sequence[Any],
        counts: Sequence[float],
    ) -> dict[str, dict[str, Predictions]]:
        """Call `finish` with the loaders of a trainer.

        Args:
            trainer: Trainer within an evaluation.
            module: The model.
            class_logits: Function as in `add`.
            loaders: The trainer's loaders of this stage.
            counts: Number of batches of each loader.
        """
        passes = [
            DataPass(trainer, loader, n, "Ensembles", index, transient=True, repeats=True)
            for index, (loader, n) in enumerate(zip(loaders, counts, strict=True))
        ]
        shards = [find_sampler_shard(trainer, loader, n) for loader, n in zip(loaders, counts, strict=True)]
        return self.finish(module, class_logits, passes, shards)

    def log(self, trainer: L.Trainer, module: L.LightningModule, name: str) -> None:
        """Log the metrics of every method; after a test, print the table, and write the comparison where it is shown.

        Like Lightning's own table, ours is left out with `trainer.test(verbose=False)`.

        Args:
            trainer: Trainer within an evaluation.
            module: The module.
            name: Prefix of logged names, or empty.
        """
        metrics = {f"{name}/{key}" if name else key: value for key, value in self.metrics().items()}
        # Equal on every rank, but Lightning requires a reduction; unlike a mean, a maximum does not round.
        module.log_dict(metrics, reduce_fx="max", sync_dist=trainer.world_size > 1)
        if self.stage == "test" and not is_trial(trainer) and trainer.is_global_zero:
            self.report(
                [Path(logger.log_dir) / name for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)],
                logged_step(trainer),
                verbose=trainer.test_loop.verbose,
                writers=figure_writers(trainer.loggers, name),
            )

    def metrics(self) -> dict[str, float]:
        """Metrics of every method by `{method}/{loader}/{metric}`."""
        return {
            f"{method}/{name}/{metric}": float(value)
            for name, by_method in self._predictions.items()
            for method, predictions in by_method.items()
            for metric, value in calibration_values(predictions.log_probs, predictions.labels).items()
        }

    def results(self, loader: int = 0) -> list[MethodResult]:
        """Results for the report package, one per method.

        Raises:
            KeyError: If that loader had no batch.
        """
        predictions = self._predictions[self._names[loader]]
        return [
            MethodResult(
                method.name,
                method.label,
                self._fitted.seed,
                predictions[method.name].log_probs,
                predictions[method.name].labels,
                tuple(map(str, range(len(predictions[method.name].labels)))),
                method.hyperparameters(self._fitted.state_of(method)),
                option_columns(method),
                predictions[method.name].warnings,
            )
            for method in self._methods
        ]

    def report(
        self, folders: Sequence[Path], step: int, *, verbose: bool, writers: Sequence[FigureWriter] = ()
    ) -> None:
        """Print the results table of each loader, and write its TensorBoard sub-runs and the figures of other loggers.

        Args:
            folders: Folders of TensorBoard loggers. The sub-runs of an earlier test stay as they are.
            step: Number of training steps, as on the axis of the training curves.
            verbose: Whether to print.
            writers: What writes figures to other loggers.
        """
        if not folders and not verbose and not writers:
            return
        for loader, name in self._names.items():
            results = self.results(loader)
            rows = summarise(results)
            log_figures(writers, results, rows, name, step)
            if verbose:
                print("", *([] if name == self.stage else [name]), results_table(rows), sep="\n", flush=True)
            for folder in folders:
                sub_runs = _unused(folder / ("methods" if name == self.stage else name))
                write_tensorboard(sub_runs, results, rows, step=step)


def _unused(folder: Path) -> Path:
    """The folder, or with `-2`, `-3`, ... appended the first that has no comparison of an earlier test."""
    numbered = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2))
    return next(path for path in itertools.chain([folder], numbered) if not has_comparison(path))


def log_scalars(trainer: L.Trainer, scalars: Mapping[str, float], name: str) -> None:
    """Log the numbers of a fit, in a hook where `self.log` is not allowed.

    Args:
        trainer: Trainer at the end of training.
        scalars: Values by name.
        name: Prefix of logged names, or empty.
    """
    prefixed = {f"{name}/{key}" if name else key: value for key, value in scalars.items()}
    for logger in trainer.loggers:
        logger.log_metrics(prefixed, step=logged_step(trainer))


def _gathered(predictions: Predictions, shard: SamplerShard) -> Predictions:
    """The predictions of all ranks, whose longest questions may differ. A collective."""
    width = max(gather_number(predictions.logits.shape[1]))
    log_probs, logits = (
        shard.gather(joined_logits([values], width)) for values in (predictions.log_probs, predictions.logits)
    )
    uncertainty = {name: shard.gather(scores) for name, scores in predictions.uncertainty.items()}
    labels = shard.gather(predictions.labels)
    return replace(predictions, log_probs=log_probs, labels=labels, logits=logits, uncertainty=uncertainty)
