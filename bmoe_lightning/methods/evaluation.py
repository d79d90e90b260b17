"""Predict a data set with several methods in shared passes over it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bmoe_lightning.experts.counted_batch import lockstep
from bmoe_lightning.experts.fsdp import runs_in_lockstep
from bmoe_lightning.experts.logits_contract import ClassLogits, checked_labels, joined_logits
from bmoe_lightning.experts.threads import model_lock
from bmoe_lightning.laplace.posterior import LaplacePosterior
from bmoe_lightning.methods.base import MemberFit, Method, check_method_names
from bmoe_lightning.methods.batch_view import BatchView, LastingValues
from bmoe_lightning.methods.fit_result import FitResult
from bmoe_lightning.methods.snapshots import check_snapshots
from bmoe_lightning.utils.distributed import failing_together


@dataclass(frozen=True)
class Predictions:
    """Predictions of one method on a data set, on the CPU.

    Attributes:
        log_probs: Log-probabilities `[N, K]` float64.
        labels: Labels `[N]` int64.
        logits: Logits `[N, K]` float64 of the model (MAP), whatever the method.
        uncertainty: Scores `[N]` float64 of a method with a posterior by name, see `Method.uncertainty`.
        warnings: What makes them doubtful, one sentence each: of the run's fit, and of the fits of other members.
    """

    log_probs: Tensor
    labels: Tensor
    logits: Tensor
    uncertainty: Mapping[str, Tensor] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


class Evaluation:
    """Predicts a data set batch by batch with several methods; all single-member methods share one pass.

    Args:
        methods: Methods with distinct names.
        fitted: Result of their fit.
        snapshots: Snapshots of the trained weights after the last epochs, for methods that need them.

    Raises:
        ValueError: If names are not distinct, a method has not been fitted, or a snapshot belongs to another fit.
    """

    def __init__(self, methods: Sequence[Method], fitted: FitResult, snapshots: Sequence[Path] = ()) -> None:
        check_method_names(methods)
        self.methods = tuple(methods)
        self._fitted = fitted
        self._snapshots = _of_fit(snapshots, fitted, methods)
        self._states = {method.name: fitted.state_of(method) for method in methods}
        self._single = [method for method in methods if not method.is_ensemble]
        self._posteriors: dict[str, LaplacePosterior] | None = None
        self._lasting = LastingValues()
        self._log_probs: dict[str, list[Tensor]] = {method.name: [] for method in self._single}
        self._uncertainty: dict[str, list[dict[str, Tensor]]] = {method.name: [] for method in self._single}
        self._labels: list[Tensor] = []
        self._logits: list[Tensor] = []

    def view(self, model: nn.Module, class_logits: ClassLogits, batch: Any) -> BatchView:
        """The view of a batch that all single-member methods share."""
        if self._posteriors is None:
            used = [method.curvatures_of(self._states[method.name]) for method in self._single]
            self._posteriors = self._fitted.posteriors_for([*itertools.chain(*used)], model)
        return BatchView(model, class_logits, batch, self._posteriors, seed=self._fitted.seed, lasting=self._lasting)

    def check_members(self, model: nn.Module) -> None:
        """Check before the first batch that the members of every ensemble can be set up; see `Method.check_members`."""
        for method in self.methods:
            if method.is_ensemble:
                method.check_members(model, self._states[method.name], self._snapshots)

    def add(self, model: nn.Module, class_logits: ClassLogits, batch: Any) -> tuple[Tensor, Tensor]:
        """Predict one batch with every single-member method.

        Returns:
            Logits `[B, K]` float64 of the model, and labels `[B]` int64 on the CPU.

        Raises:
            ValueError: If the batch has no labels.
        """
        with failing_together(distributed=runs_in_lockstep(model)):
            view = self.view(model, class_logits, batch)
            labels = _labels(view)
            for method in self._single:
                state = self._states[method.name]
                self._log_probs[method.name].append(method.log_probs(view, state).cpu())
                scores = method.uncertainty(view, state)
                self._uncertainty[method.name].append({name: score.cpu() for name, score in scores.items()})
            self._labels.append(labels)
            self._logits.append(view.logits.cpu())
            return view.logits, labels

    def finish(self, model: nn.Module, class_logits: ClassLogits, batches: Iterable[Any]) -> dict[str, Predictions]:
        """Predict the same data with the ensembles, and return the predictions of every method.

        Args:
            model: The model; its weights are unchanged afterwards.
            class_logits: Function as in `add`.
            batches: The batches that were added, in the same order; iterated over once per member.

        Raises:
            ValueError: If nothing was added, or the order of the data changed.
        """
        if not self._labels:
            raise ValueError("no examples to evaluate: the data are empty; pass at least one batch")
        labels, logits = torch.cat(self._labels), joined_logits(self._logits)
        result = {}
        for method in self.methods:
            if method.is_ensemble:
                log_probs, warnings = self._ensemble(method, model, class_logits, batches, labels)
                result[method.name] = Predictions(log_probs, labels, logits, warnings=warnings)
                continue
            parts = self._uncertainty[method.name]
            uncertainty = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            log_probs = joined_logits(self._log_probs[method.name])
            result[method.name] = Predictions(log_probs, labels, logits, uncertainty, self._fitted.warnings_of(method))
        return result

    def _ensemble(
        self, method: Method, model: nn.Module, class_logits: ClassLogits, batches: Iterable[Any], labels: Tensor
    ) -> tuple[Tensor, tuple[str, ...]]:
        """Log-probabilities `[N, K]` of an ensemble, and the warnings of all its fits, each distinct sentence once."""
        fitted, state = self._fitted, self._states[method.name]
        posteriors = fitted.posteriors_for(method.curvatures_of(state), model)
        own = MemberFit(state, posteriors, fitted.warnings_of(method))
        contexts = method.members(model, state, self._snapshots)
        members = [_member(context, method, own, model, class_logits, batches, fitted.seed) for context in contexts]
        if any(not torch.equal(found, labels) for _, found, _ in members):
            raise ValueError(
                f"{method.name} runs one pass over the data per member, and their order changed in between; use a "
                "loader that does not shuffle"
            )
        warnings = dict.fromkeys(itertools.chain(own.warnings, *(said for *_, said in members)))
        return average_log_probs(torch.stack([log_probs for log_probs, *_ in members])), tuple(warnings)


def evaluate(
    methods: Sequence[Method],
    fitted: FitResult,
    model: nn.Module,
    class_logits: ClassLogits,
    batches: Iterable[Any],
    snapshots: Sequence[Path] = (),
) -> dict[str, Predictions]:
    """Predict a data set with several methods.

    Args:
        methods: Methods with distinct names.
        fitted: Result of their fit.
        model: The model.
        class_logits: Function `(model, batch) -> (logits [B, K], labels [B])`.
        batches: Iterable of batches; it must be re-iterable (a list, a DataLoader) if a method is an ensemble.
        snapshots: Snapshots of the trained weights after the last epochs, for methods that need them.

    Returns:
        Predictions by method name.

    Raises:
        ValueError: If there are no batches or a batch has no labels, or a file of an ensemble's member is missing; this
            and other faults of members are found before the first batch.
    """
    evaluation = Evaluation(methods, fitted, snapshots)
    evaluation.check_members(model)
    for batch in lockstep(model, batches):
        evaluation.add(model, class_logits, batch)
    return evaluation.finish(model, class_logits, batches)


class Predictor:
    """Predicts batches with one method, without labels; an ensemble runs all its members on each batch.

    Args:
        method: The method.
        fitted: Result of its fit.
        snapshots: Snapshots of the trained weights after the last epochs, for methods that need them.

    Raises:
        NotFittedError: If the method has not been fitted.
        ValueError: If a snapshot belongs to another fit.
    """

    def __init__(self, method: Method, fitted: FitResult, snapshots: Sequence[Path] = ()) -> None:
        self.method = method
        self._fitted = fitted
        self._state = fitted.state_of(method)
        self._snapshots = _of_fit(snapshots, fitted, [method])
        self._posteriors: dict[str, LaplacePosterior] | None = None
        self._lasting = LastingValues()

    def predict(self, model: nn.Module, class_logits: ClassLogits, batch: Any) -> tuple[Tensor, BatchView]:
        """Predict one batch.

        Returns:
            Log-probabilities `[B, K]` float64, and the view of the batch under the current weights.
        """
        return self.predict_batches(model, class_logits, [batch])[0]

    def predict_batches(
        self, model: nn.Module, class_logits: ClassLogits, batches: Sequence[Any]
    ) -> list[tuple[Tensor, BatchView]]:
        """Predict several batches; each member of an ensemble is set up once for all of them.

        Returns:
            As `predict`, for each batch.
        """
        with failing_together(distributed=runs_in_lockstep(model)):
            if self._posteriors is None:
                self._posteriors = self._fitted.posteriors_for(self.method.curvatures_of(self._state), model)
            posteriors = {} if self.method.is_ensemble else self._posteriors
            views = [
                BatchView(model, class_logits, batch, posteriors, seed=self._fitted.seed, lasting=self._lasting)
                for batch in batches
            ]
            if not self.method.is_ensemble:
                return [(self.method.log_probs(view, self._state), view) for view in views]
            found = self._of_members(model, class_logits, batches, MemberFit(self._state, self._posteriors))
            return [(average_log_probs(torch.stack(members)), view) for members, view in zip(found, views, strict=True)]

    def _of_members(
        self, model: nn.Module, class_logits: ClassLogits, batches: Sequence[Any], own: MemberFit
    ) -> list[list[Tensor]]:
        """Log-probabilities of each batch and member."""
        found: list[list[Tensor]] = [[] for _ in batches]
        for context in self.method.members(model, self._state, self._snapshots):
            with prepared_member(model, context, own) as fit:
                for members, batch in zip(found, batches, strict=True):
                    view = BatchView(model, class_logits, batch, fit.posteriors, seed=self._fitted.seed)
                    members.append(self.method.log_probs(view, fit.state))
        return found

    def covariance(self, view: BatchView) -> tuple[Tensor, Tensor] | None:
        """Logits and their covariance, see `Method.logit_covariance`.

        None without one, and for an ensemble, whose logits have none in common.
        """
        return None if self.method.is_ensemble else self.method.logit_covariance(view, self._state)

    def uncertainty(self, view: BatchView) -> dict[str, Tensor]:
        """Scores `[B]` by name, see `Method.uncertainty`; none of an ensemble."""
        return {} if self.method.is_ensemble else self.method.uncertainty(view, self._state)


def _of_fit(snapshots: Sequence[Path], fitted: FitResult, methods: Sequence[Method]) -> tuple[Path, ...]:
    """Check that no snapshot belongs to another fit: a file may have been replaced since the fit was made or loaded."""
    if any(method.needs.max_snapshots for method in methods):
        check_snapshots(snapshots, fitted.fit_id)
    return tuple(snapshots)


@contextmanager
def prepared_member(
    model: nn.Module, context: AbstractContextManager[MemberFit | None], own: MemberFit
) -> Iterator[MemberFit]:
    """The fit that a member predicts with, while the model is set up for it and its lock is held.

    Args:
        model: The model.
        context: The member, an entry of `Method.members`.
        own: Fit of the members without one of their own.
    """
    with model_lock(model), context as other:
        yield own if other is None else other


def average_log_probs(log_probs: Tensor) -> Tensor:
    """Average probabilities over the first axis, in log space: `[M, ...]` to `[...]`."""
    return torch.logsumexp(log_probs, dim=0) - math.log(len(log_probs))


def _member(
    context: AbstractContextManager[MemberFit | None],
    method: Method,
    own: MemberFit,
    model: nn.Module,
    class_logits: ClassLogits,
    batches: Iterable[Any],
    seed: int,
) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Log-probabilities `[N, K]` of one member on the data set, the labels `[N]`, and the warnings of its fit."""
    log_probs, labels = [], []
    with prepared_member(model, context, own) as fit, failing_together(distributed=runs_in_lockstep(model)):
        for batch in lockstep(model, batches):
            view = BatchView(model, class_logits, batch, fit.posteriors, seed=seed)
            log_probs.append(method.log_probs(view, fit.state).cpu())
            labels.append(_labels(view))
    if not labels:
        raise ValueError(
            f"{method.name} runs one pass over the data per member, and a second pass had no batch; use data that "
            "can be iterated over again"
        )
    return joined_logits(log_probs), torch.cat(labels), fit.warnings


def _labels(view: BatchView) -> Tensor:
    if view.labels is None:
        raise ValueError("evaluation needs labels, but class_logits returned None for them; return (logits, labels)")
    return checked_labels(view.labels, view.logits).cpu()
