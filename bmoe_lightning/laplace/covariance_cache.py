"""What the caches of a validation set's covariance terms have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from bmoe_lightning.experts.logits_contract import checked_labels


@dataclass(frozen=True)
class CovarianceCache(ABC):
    """Logits and covariance terms of a validation set, from which predictions follow for any prior precision.

    Attributes:
        logits: Logits `[N, K]` float64 of the examples that have terms, `-inf` for absent classes.
        labels: Labels `[N]` int64, or None without labels.
    """

    logits: Tensor
    labels: Tensor | None

    @property
    @abstractmethod
    def num_layers(self) -> int:
        """Number of layers L."""

    @property
    @abstractmethod
    def terms(self) -> tuple[Tensor, ...]:
        """The covariance terms of the examples."""

    @abstractmethod
    def noise(self, num_samples: int, seed: int, num_deviations: int = 0) -> Tensor:
        """Standard normal noise `[S, ...]` for `nll`, with S at most `num_samples`.

        Args:
            num_samples: Maximum number of samples.
            seed: Seed.
            num_deviations: Number R of the deviations that `nll` is given; the other columns do not depend on it.
        """

    @abstractmethod
    def nll(self, precision: Tensor, noise: Tensor, labels: Tensor, deviations: Tensor | None = None) -> Tensor:
        """Mean NLL of the MC predictive, differentiable.

        Args:
            precision: Prior precision `[L]`; infinite for no variance.
            noise: Noise from `noise`.
            labels: Labels `[N]`.
            deviations: `D [N, K, R]`, zero for absent classes: `D D^T` is added to the covariance of the logits.
        """

    @abstractmethod
    def covariance(self, precision: Tensor) -> Tensor:
        """The covariance of the centred logits at precisions `[L]`: `[N, K, K]` float64."""

    def positions(self) -> Tensor:
        """Positions `[N]` int64, among all examples of the set, of those that have terms."""
        return torch.arange(len(self.logits))

    def all_examples(self) -> tuple[Tensor, Tensor | None]:
        """Logits `[M, K]` and labels `[M]` (or None) of all examples of the set, also of those without terms."""
        return self.logits, self.labels

    @property
    @abstractmethod
    def is_exact(self) -> bool:
        """Whether the terms are exact and of all examples, rather than what a stated memory allows."""

    @property
    def nbytes(self) -> int:
        """Size of the covariance terms in bytes."""
        return sum(values.nbytes for values in self.terms)

    @property
    def is_finite(self) -> bool:
        """Whether all covariance terms are finite."""
        return all(bool(values.isfinite().all()) for values in self.terms)

    def labelled(self) -> tuple[Tensor, Tensor]:
        """Logits `[N, K]` and checked labels `[N]`.

        Raises:
            ValueError: If there are no labels, or a label is no class of its example; see `checked_labels`.
        """
        if self.labels is None:
            raise ValueError(
                "held-out labels are needed, but class_logits returned None for them; return (logits, labels)"
            )
        return self.logits, checked_labels(self.labels, self.logits)
