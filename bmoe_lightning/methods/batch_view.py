"""One batch and the model's output on it, as every method receives it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bmoe_lightning.curvature.spec import Curvature
from bmoe_lightning.experts.batch_copies import batch_rows
from bmoe_lightning.experts.batch_parts import joined_labels, run_in_parts
from bmoe_lightning.experts.logits_contract import ClassLogits, joined_logits, masked_logits, run_class_logits
from bmoe_lightning.experts.model_state import evaluation_mode
from bmoe_lightning.laplace.covariance import BatchTerms, prior_covariance
from bmoe_lightning.laplace.posterior import LaplacePosterior, posterior_terms

T = TypeVar("T")


class LastingValues:
    """What predictions of several batches share, by model; whoever predicts the batches owns it.

    Models are not kept alive, and a copy or a pickle has no values.
    """

    def __init__(self) -> None:
        self._of_models: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, Any]] = weakref.WeakKeyDictionary()

    def __reduce__(self) -> tuple[type[LastingValues], tuple[()]]:
        return LastingValues, ()

    def of(self, model: nn.Module) -> dict[Hashable, Any]:
        """The values of a model."""
        return self._of_models.setdefault(model, {})


class BatchView:
    """One batch and the model's output on it, computed lazily and cached.

    The covariance terms of all posteriors and the logits come from one forward pass.

    Attributes:
        model: The model.
        seed: Seed for the noise of the methods.
        lasting: Values of this model that other batches share, by what they depend on.

    Args:
        model: The model.
        class_logits: Function `(model, batch) -> (logits [B, K], labels [B] or None)`.
        batch: Batch that `class_logits` accepts.
        posteriors: Posteriors whose covariances will be computed, by the digest of their curvature.
        seed: Seed for the noise of the methods.
        lasting: What is shared with other batches.
    """

    def __init__(
        self,
        model: nn.Module,
        class_logits: ClassLogits,
        batch: Any,
        posteriors: Mapping[str, LaplacePosterior] | None = None,
        *,
        seed: int = 0,
        lasting: LastingValues | None = None,
    ) -> None:
        self.model = model
        self.seed = seed
        self.lasting = (lasting or LastingValues()).of(model)
        self._class_logits = class_logits
        self._batch = batch
        self._posteriors = dict(posteriors or {})
        self._cached_terms: dict[str, BatchTerms] | None = None
        self._cached_output: tuple[Tensor, Tensor | None] | None = None
        self._cached_values: dict[Hashable, Any] = {}
        self._seen_labels: tuple[Tensor | None] | None = None

    @classmethod
    def of_logits(cls, logits: Tensor, labels: Tensor | None = None) -> BatchView:
        """A view of precomputed logits, for methods that use nothing else.

        Args:
            logits: Logits `[B, K]` float64, `-inf` for absent classes.
            labels: Labels `[B]` int64, or None.
        """
        return cls(nn.Identity(), lambda *_: (logits, labels), None)

    @property
    def logits(self) -> Tensor:
        """Logits `[B, K]` float64 of the model in evaluation mode, `-inf` for absent classes."""
        return self._output[0]

    @property
    def labels(self) -> Tensor | None:
        """Labels as `class_logits` returned them, or None; see `checked_labels`."""
        if self._seen_labels is not None and self._cached_output is None and not self._posteriors:
            return self._seen_labels[0]
        return self._output[1]

    def terms(self, curvature: Curvature) -> BatchTerms:
        """The terms of the covariance of the centred logits under a curvature.

        Raises:
            RuntimeError: If the view has no posterior of this curvature.
        """
        if curvature.digest not in self._posteriors:
            raise RuntimeError(
                f"no posterior of this curvature ({curvature.description()}); a method's `curvatures` must name every "
                "curvature that its fit or its predictions use"
            )
        return self._terms[curvature.digest]

    def covariance(self, curvature: Curvature, prior_precision: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and their covariance under the linearised model.

        Args:
            curvature: Curvature of the posterior.
            prior_precision: Prior precision `[L]`, one value per layer.

        Returns:
            Logits `[B, K]` and the covariance `[B, K, K]` of the centred logits, float64. Absent classes have
            logit `-inf` and covariance zero.
        """
        terms = self.terms(curvature)
        return terms.logits, self._posteriors[curvature.digest].covariance_of(terms, prior_precision)

    def prior_covariance(self, curvature: Curvature, prior_precision: Tensor) -> Tensor:
        """The covariance `[B, K, K]` of the centred logits under the prior, before any data; as `covariance`."""
        return prior_covariance(self.terms(curvature), prior_precision)

    def forward(self) -> tuple[Tensor, Tensor | None]:
        """Run another forward pass in evaluation mode: logits `[B, K]` float64 and labels as returned."""
        logits, labels = self._run(self._batch)
        self._seen_labels = (labels,)
        return logits, labels

    def forward_copies(self, copies: int, context: AbstractContextManager[None]) -> Tensor:
        """Run one forward pass in evaluation mode on copies of the batch's rows, one after another.

        Args:
            copies: Number of copies.
            context: Context within which the model runs.

        Returns:
            Logits `[copies, B, K]` float64, `-inf` for absent classes.

        Raises:
            ValueError: If there are several copies, and the batch has no rows, or the copies do not have the classes
                of the batch.
        """
        if copies == 1:
            with context:
                return self.forward()[0].unsqueeze(0)
        absent = self.logits == -torch.inf  # before the context, within which they are others
        batch = batch_rows(self._batch, [*range(len(absent))] * copies, len(absent))
        if batch is None:
            raise ValueError(
                f"nothing in the batch has a row for each of its {len(absent)} examples, so there is nothing to copy; "
                "compute one sample in a pass"
            )
        with context, torch.no_grad(), evaluation_mode(self.model):
            logits = masked_logits(run_class_logits(self._class_logits, self.model, batch)[0])
        if not torch.equal(logits == -torch.inf, absent.repeat(copies, 1)):
            raise ValueError(
                f"class_logits does not give {copies} copies of a batch the classes of the batch ({tuple(logits.shape)}"
                f" from {tuple(absent.shape)}), so it depends on more than each row; compute one sample in a pass"
            )
        return logits.view(copies, *absent.shape)

    def once(self, key: Hashable, compute: Callable[[], T]) -> T:
        """A value that is computed once for the batch: what predictions and scores of uncertainty share.

        Args:
            key: Whatever the value depends on besides the batch.
            compute: Function that computes it.
        """
        if key not in self._cached_values:
            self._cached_values[key] = compute()
        found: T = self._cached_values[key]
        return found

    # Not cached_property, which before Python 3.12 holds a lock of all instances while it computes.

    @property
    def _terms(self) -> dict[str, BatchTerms]:
        if self._cached_terms is None:
            posteriors = list(self._posteriors.values())
            terms = posterior_terms(posteriors, self.model, self._class_logits, self._batch)
            self._cached_terms = dict(zip(self._posteriors, terms, strict=True))
        return self._cached_terms

    @property
    def _output(self) -> tuple[Tensor, Tensor | None]:
        if self._posteriors:
            terms = next(iter(self._terms.values()))
            return terms.logits, terms.labels  # one forward pass gives both
        if self._cached_output is None:
            parts = run_in_parts(
                self.model, self._class_logits, self._batch, self._run, lambda part: part[0], work="forward pass"
            )
            logits, labels = zip(*parts, strict=True)
            self._cached_output = joined_logits(logits), joined_labels(labels)
        return self._cached_output

    def _run(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        with torch.no_grad(), evaluation_mode(self.model):
            logits, labels = run_class_logits(self._class_logits, self.model, batch)
        return masked_logits(logits), labels
