"""One `trainer.validate` or `trainer.test`, as the callback sees it: predictions, metrics, TensorBoard."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bmoe_lightning.experts import ClassLogits
from bmoe_lightning.laplace.posterior import LaplacePosterior
from bmoe_lightning.laplace.predictive import class_probabilities, entropy, predict_with_uncertainty
from bmoe_lightning.methods.method import Evaluation, Predictions
from bmoe_lightning.methods.options import FitSettings
from bmoe_lightning.methods.workbench import Fitted, build_methods
from bmoe_lightning.metrics import calibration_metrics
from bmoe_lightning.report import MethodResult, summarise, write_tensorboard
from bmoe_lightning.trainer.sampler_shards import SamplerShard


class EvaluationRun:
    """Predictions of every method on every loader of one run.

    Args:
        stage: `val` or `test`, as it appears in logged names.
        settings: which methods, and how they predict.
        fitted: what they were fitted to.
        snapshots: files of the checkpoint ensemble.
        ensemble_members: files of the deep ensemble.
    """

    def __init__(
        self,
        stage: str,
        settings: FitSettings,
        fitted: Fitted,
        snapshots: Sequence[Path],
        ensemble_members: Sequence[str],
    ) -> None:
        self.stage = stage
        self._settings = settings
        self._fitted = fitted
        self._snapshots = snapshots
        self._ensemble_members = ensemble_members
        self._evaluations: dict[int, Evaluation] = {}
        self._predictions: dict[str, dict[str, Predictions]] = {}
        self._names: dict[int, str] = {}  # of the loaders that had a batch

    def add(self, module: nn.Module, class_logits: ClassLogits, batch: Any, loader: int) -> None:
        """Predict one batch of a loader with every single-member method."""
        if loader not in self._evaluations:
            methods = build_methods(
                module,
                self._settings,
                self._fitted,
                snapshots=self._snapshots,
                ensemble_members=self._ensemble_members,
            )
            self._evaluations[loader] = Evaluation(methods, self._fitted.posterior)
        self._evaluations[loader].add(module, class_logits, batch)

    def finish(
        self,
        module: nn.Module,
        class_logits: ClassLogits,
        passes: Sequence[Iterable[Any]],
        shares: Sequence[SamplerShard | None] | None = None,
    ) -> dict[str, dict[str, Predictions]]:
        """Let the ensembles predict, and return all predictions: by loader (`test`, or `test_0`, ...), then by method.

        Args:
            module: the model.
            class_logits: as in `add`.
            passes: each loader once more, as in `add`.
            shares: on several processes, which part of each loader this one has seen. All call this then, and each gets
                the predictions of all.
        """
        for loader, evaluation in self._evaluations.items():
            name = self.stage if len(passes) == 1 else f"{self.stage}_{loader}"
            self._names[loader] = name
            found = evaluation.finish(module, class_logits, passes[loader])
            share = None if shares is None else shares[loader]
            if share is not None:
                found = {m: Predictions(share.gather(p.log_probs), share.gather(p.labels)) for m, p in found.items()}
            self._predictions[name] = found
        return self._predictions

    def metrics(self) -> dict[str, float]:
        """`{method}/{loader}/{acc|ece|nll|brier}` of every method."""
        values: dict[str, float] = {}
        for name, by_method in self._predictions.items():
            for method, predictions in by_method.items():
                metrics = calibration_metrics()
                metrics.update(predictions.log_probs, predictions.labels)
                values |= {f"{method}/{name}/{key}": float(value) for key, value in metrics.compute().items()}
        return values

    def results(self, loader: int = 0) -> list[MethodResult]:
        """What the report package takes, one entry a method.

        Raises:
            KeyError: if that loader had no batch.
        """
        name = self._names[loader]
        results = []
        for method in self._evaluations[loader].methods:
            predictions = self._predictions[name][method.name]
            ids = tuple(str(index) for index in range(len(predictions.labels)))
            numbers = method.hyperparameters()
            results.append(
                MethodResult(
                    method.name,
                    method.label,
                    self._settings.seed,
                    predictions.log_probs,
                    predictions.labels,
                    ids,
                    numbers,
                )
            )
        return results

    def write_tensorboard(self, folder: Path, step: int) -> None:
        """Write one sub-run a method, for each loader.

        Args:
            folder: the logger's own folder.
            step: training steps so far, the axis that the training curves have.
        """
        for loader, name in self._names.items():
            results = self.results(loader)
            write_tensorboard(
                folder / ("methods" if name == self.stage else name),
                results,
                summarise(results),
                hyperparameters={
                    "rank": self._settings.rank,
                    "fisher": self._settings.fisher,
                    "link": self._settings.link,
                },
                step=step,
            )


def uncertain_prediction(
    posterior: LaplacePosterior, module: nn.Module, class_logits: ClassLogits, batch: Any, settings: FitSettings
) -> dict[str, Tensor]:
    """What `trainer.predict` returns for a batch.

    Args:
        posterior: at the prior precision to predict with.
        module: the model.
        class_logits: `(module, batch) -> (logits [B, K], labels or None)`.
        batch: whatever `class_logits` takes.
        settings: link, number of samples and seed.

    Returns:
        `probs`, `log_probs` and `logits` `[B, K]`, `logit_covariance` `[B, K, K]` of the centred logits, and in nats
        `entropy` `[B]` of `probs` and `mutual_information` `[B]` between label and weights (always from Monte Carlo).
    """
    options = {"num_samples": settings.num_samples, "seed": settings.seed}
    logits, covariance = posterior.logit_covariance(module, class_logits, batch, centred=True)
    sampled = predict_with_uncertainty(logits, covariance, **options)
    log_probs = sampled.log_probs
    if settings.link != "mc":
        log_probs = class_probabilities(logits, covariance, settings.link, **options)
    return {
        "probs": log_probs.exp(),
        "log_probs": log_probs,
        "logits": logits,
        "logit_covariance": covariance,
        "entropy": entropy(log_probs),
        "mutual_information": sampled.mutual_information,
    }
