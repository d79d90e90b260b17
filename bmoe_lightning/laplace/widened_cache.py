"""Covariance terms of a validation set beside a covariance that does not depend on the prior precision."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bmoe_lightning.laplace.covariance_cache import CovarianceCache
from bmoe_lightning.laplace.predictive import square_root


@dataclass(frozen=True)
class WidenedCache(CovarianceCache):
    """Logits and covariance terms of a validation set, with a further source of uncertainty of known size.

    Attributes:
        terms_of: The terms that depend on the prior precision.
        deviations: `D [N, K, R]` float64, zero for absent classes: `D D^T` is added to the covariance.
    """

    terms_of: CovarianceCache
    deviations: Tensor

    @classmethod
    def of(cls, cache: CovarianceCache, logits: Tensor, deviations: Tensor) -> WidenedCache:
        """A cache around other mean logits, and with a further covariance.

        Args:
            cache: Covariance terms.
            logits: Mean logits `[M, K]` of all examples of the set.
            deviations: `D [M, K, R]` of all examples; what is common to the logits of an example has no effect.
        """
        examples = cache.positions()
        widened = replace(cache, logits=logits[examples])
        root = deviations[examples]
        if root.shape[2] > root.shape[1]:
            root = square_root(root @ root.mT)
        return cls(widened.logits, widened.labels, widened, root)

    @property
    def num_layers(self) -> int:
        """Number of layers L."""
        return self.terms_of.num_layers

    @property
    def is_exact(self) -> bool:
        """Whether the terms that depend on the prior precision are exact and of all examples."""
        return self.terms_of.is_exact

    @property
    def terms(self) -> tuple[Tensor, ...]:
        """The covariance terms of the examples."""
        return *self.terms_of.terms, self.deviations

    def positions(self) -> Tensor:
        """Positions `[N]` int64, among all examples of the set, of those that have terms."""
        return self.terms_of.positions()

    def all_examples(self) -> tuple[Tensor, Tensor | None]:
        """Logits `[M, K]` and labels `[M]` (or None) of all examples of the set, also of those without terms."""
        return self.terms_of.all_examples()

    def noise(self, num_samples: int, seed: int, num_deviations: int = 0) -> Tensor:
        """Standard normal noise for `nll`; see `CovarianceCache`."""
        return self.terms_of.noise(num_samples, seed, self.deviations.shape[2] + num_deviations)

    def nll(self, precision: Tensor, noise: Tensor, labels: Tensor, deviations: Tensor | None = None) -> Tensor:
        """Mean NLL of the MC predictive at precisions `[L]`; see `CovarianceCache`."""
        own = self.deviations if deviations is None else torch.cat([self.deviations, deviations], dim=2)
        return self.terms_of.nll(precision, noise, labels, own)

    def covariance(self, precision: Tensor) -> Tensor:
        """The covariance of the logits at precisions `[L]`: `[N, K, K]`."""
        return self.terms_of.covariance(precision) + self.deviations @ self.deviations.mT
