"""The one shape of every method: what it needs from a batch, and what it says about it.

A method turns a `BatchView` into log-probabilities. The view runs the model at most once for the plain logits and once
for the covariance terms, however many methods ask. A method with several members (an ensemble) prepares the model for
each in a context manager; members are looped over outside, batches inside, so that weights are loaded once a member and
not once a batch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from bmoe_lightning.experts.taps import ClassLogits, check_logits, evaluation_mode
from bmoe_lightning.laplace.covariance import BatchTerms
from bmoe_lightning.laplace.posterior import LaplacePosterior


class BatchView:
    """One batch, seen through the model; everything is computed when first asked for, and once.

    Args:
        model: the model.
        class_logits: `(model, batch) -> (logits [B, K], labels [B] or None)`.
        batch: whatever `class_logits` takes.
        posterior: shared curvature, where a method of this run needs covariances.
    """

    def __init__(
        self, model: nn.Module, class_logits: ClassLogits, batch: Any, posterior: LaplacePosterior | None = None
    ) -> None:
        self.model = model
        self._class_logits = class_logits
        self._batch = batch
        self._posterior = posterior

    @cached_property
    def terms(self) -> BatchTerms:
        """What the covariance of the centred logits is made of.

        Raises:
            RuntimeError: if the view was made without a posterior.
        """
        if self._posterior is None:
            raise RuntimeError("this method needs a posterior, and none has been fitted")
        return self._posterior.batch_terms(self.model, self._class_logits, self._batch)

    @property
    def logits(self) -> Tensor:
        """`[B, K]` float64, `-inf` for absent classes, of the model in evaluation mode."""
        return self._output[0]

    @property
    def labels(self) -> Tensor | None:
        """`[B]` int64, or None."""
        return self._output[1]

    def forward(self) -> tuple[Tensor, Tensor | None]:
        """Run the model anew, in evaluation mode: logits `[B, K]` float64 and labels."""
        with torch.no_grad(), evaluation_mode(self.model):
            logits, labels = self._class_logits(self.model, self._batch)
        check_logits(logits)
        return logits.double(), labels

    @cached_property
    def _output(self) -> tuple[Tensor, Tensor | None]:
        if self._posterior is not None:
            return self.terms.logits, self.terms.labels  # the same forward serves both
        return self.forward()


class Method(ABC):
    """A way to predict class probabilities.

    Attributes:
        name: short identifier, as in tables and TensorBoard runs.
        label: what a person reads.
        needs_posterior: whether `log_probs` looks at covariance terms.
        is_ensemble: whether the model has to be prepared for each of several members.
    """

    name: str
    label: str
    needs_posterior: bool = False
    is_ensemble: bool = False

    @abstractmethod
    def log_probs(self, view: BatchView) -> Tensor:
        """Log-probabilities of one batch: `[B, K]` float64, `-inf` for absent classes."""

    def members(self, model: nn.Module) -> Sequence[AbstractContextManager[None]]:  # noqa: ARG002
        """Contexts that prepare the model for each member of an ensemble."""
        return [nullcontext()]

    def hyperparameters(self) -> dict[str, float]:
        """What was fitted or chosen, for the record."""
        return {}


@dataclass(frozen=True)
class Predictions:
    """What one method says about a data set.

    Attributes:
        log_probs: `[N, K]` float64 on the CPU.
        labels: `[N]` int64 on the CPU.
    """

    log_probs: Tensor
    labels: Tensor


class Evaluation:
    """Predicts a data set batch by batch with several methods; all single-member methods share one pass.

    Args:
        methods: with distinct names.
        posterior: shared curvature for methods that need it.
    """

    def __init__(self, methods: Sequence[Method], posterior: LaplacePosterior | None = None) -> None:
        self.methods = list(methods)
        if len({method.name for method in methods}) < len(self.methods):
            raise ValueError(f"methods need distinct names, got {[method.name for method in methods]}")
        self._posterior = posterior if any(method.needs_posterior for method in methods) else None
        self._log_probs: dict[str, list[Tensor]] = {method.name: [] for method in methods}
        self._labels: list[Tensor] = []

    def add(self, model: nn.Module, class_logits: ClassLogits, batch: Any) -> None:
        """Predict one batch with every method that has one member.

        Raises:
            ValueError: if the batch has no labels.
        """
        view = BatchView(model, class_logits, batch, self._posterior)
        labels = _labels(view)
        for method in self.methods:
            if not method.is_ensemble:
                self._log_probs[method.name].append(method.log_probs(view).cpu())
        self._labels.append(labels)

    def finish(self, model: nn.Module, class_logits: ClassLogits, batches: Iterable[Any]) -> dict[str, Predictions]:
        """Let the ensembles predict the same data, and return what every method said.

        Args:
            model: the model; its weights are as before afterwards.
            class_logits: as in `add`.
            batches: the data that was added, once more; iterated over once a member.

        Raises:
            ValueError: if nothing was added, or the data come in another order than before.
        """
        if not self._labels:
            raise ValueError("no example to evaluate: the data are empty")
        labels = torch.cat(self._labels)
        result = {}
        for method in self.methods:
            if method.is_ensemble:
                members = [_member(m, method, model, class_logits, batches) for m in method.members(model)]
                if any(not torch.equal(member.labels, labels) for member in members):
                    raise ValueError(
                        f"{method.name} passes over the data once a member, and their order changed in between; use a "
                        "loader that does not shuffle"
                    )
                log_probs = average_log_probs(torch.stack([member.log_probs for member in members]))
            else:
                log_probs = torch.cat(self._log_probs[method.name])
            result[method.name] = Predictions(log_probs, labels)
        return result


def evaluate(
    methods: Sequence[Method],
    model: nn.Module,
    class_logits: ClassLogits,
    batches: Iterable[Any],
    posterior: LaplacePosterior | None = None,
) -> dict[str, Predictions]:
    """Predict a data set with several methods.

    Args:
        methods: with distinct names.
        model: the model.
        class_logits: `(model, batch) -> (logits [B, K], labels [B])`.
        batches: the data; must allow being iterated over more than once (a list, a DataLoader) if a method is an
            ensemble.
        posterior: shared curvature for methods that need it.

    Returns:
        Predictions by method name.

    Raises:
        ValueError: if there is no batch or a batch has no labels.
    """
    evaluation = Evaluation(methods, posterior)
    for batch in batches:
        evaluation.add(model, class_logits, batch)
    return evaluation.finish(model, class_logits, batches)


def average_log_probs(log_probs: Tensor) -> Tensor:
    """Average probabilities over the first axis, in log space: `[M, ...]` to `[...]`."""
    return torch.logsumexp(log_probs, dim=0) - math.log(len(log_probs))


def _member(
    context: AbstractContextManager[None],
    method: Method,
    model: nn.Module,
    class_logits: ClassLogits,
    batches: Iterable[Any],
) -> Predictions:
    """What one member says about the whole data set."""
    log_probs, labels = [], []
    with context:
        for batch in batches:
            view = BatchView(model, class_logits, batch)
            log_probs.append(method.log_probs(view).cpu())
            labels.append(_labels(view))
    return Predictions(torch.cat(log_probs), torch.cat(labels))


def _labels(view: BatchView) -> Tensor:
    if view.labels is None:
        raise ValueError("evaluation needs labels, but class_logits returned None for them")
    return view.labels.cpu()
