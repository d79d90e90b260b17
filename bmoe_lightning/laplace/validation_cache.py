"""Covariance terms of a validation set, from which its predictions follow for any prior precision."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bmoe_lightning.experts.logits_contract import NO_LABEL, checked_labels, joined_logits
from bmoe_lightning.laplace.covariance import BatchTerms
from bmoe_lightning.utils.distributed import gather_examples, gather_number

_NUM_BINS = 128


@dataclass(frozen=True)
class ValidationCache:
    """Logits and covariance terms of a validation set, from which predictions follow for any prior precision.

    The projections enter a covariance only through `s / (lambda + s)`, a smooth function of log s. So their products
    are summed in bins of log s, interpolated linearly between the two nearest bin centres.

    Attributes:
        logits: Logits `[N, K]`, `-inf` for absent classes.
        labels: Labels `[N]` int64, or None without labels.
        embedding: Matrix `[N, K, P]` from contrasts to logits.
        prior: Inner products `<G_i, G_j>`, `[N, L, P, P]`.
        binned: Sums of `R_i R_j` per bin, `[N, L, bins, P, P]`.
        centres: Eigenvalue s at the centre of each bin, `[L, bins]`.
    """

    logits: Tensor
    labels: Tensor | None
    embedding: Tensor
    prior: Tensor
    binned: Tensor
    centres: Tensor

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

    def contrast_covariance(self, precision: Tensor) -> Tensor:
        """The covariance of the contrasts at precisions `[L]`: `[N, P, P]`."""
        shrinkage = self.centres / (precision.unsqueeze(1) + self.centres)
        explained = torch.einsum("nlbij,lb->nlij", self.binned, shrinkage)
        return ((self.prior - explained) / precision.view(1, -1, 1, 1)).sum(1)

    def covariance(self, precision: Tensor) -> Tensor:
        """The covariance of the centred logits at precisions `[L]`: `[N, K, K]`."""
        return self.embedding @ self.contrast_covariance(precision) @ self.embedding.mT


class CacheBuilder:
    """Collects a `ValidationCache` batch by batch, on the CPU in float64.

    Args:
        curvature: Eigenvalues `s_qp` of each layer, `[E, r_g, r_a]`.
    """

    def __init__(self, curvature: Sequence[Tensor]) -> None:
        self._curvature = list(curvature)
        self._centres = _bin_centres_of(self._curvature)
        self._parts: dict[str, list[Tensor]] = {"logits": [], "labels": [], "embedding": [], "prior": [], "binned": []}

    def add(self, terms: BatchTerms) -> None:
        """Add the centred terms of one batch."""
        parts, size = self._parts, len(terms.logits)
        parts["logits"].append(terms.logits.cpu())
        # A placeholder for missing labels, so that all ranks all-gather the same tensors.
        missing = torch.full((size,), NO_LABEL)
        labels = missing if terms.labels is None else checked_labels(terms.labels, terms.logits, values=False)
        parts["labels"].append(labels.cpu())
        parts["embedding"].append(terms.embedding.cpu())
        parts["prior"].append(torch.stack([layer.prior.to(terms.embedding) for layer in terms.layers], dim=1).cpu())
        binned = [
            _bin_products(
                layer.projections, layer.examples, s.to(layer.experts.device)[layer.experts], grid, size
            ).cpu()
            for layer, s, grid in zip(terms.layers, self._curvature, self._centres, strict=True)
        ]
        parts["binned"].append(torch.stack(binned, dim=1))

    def finish(self, *, distributed: bool = False) -> ValidationCache:
        """The cache of all batches.

        Args:
            distributed: Whether all ranks call this, each with its shard of the set (see `gather_examples`); every rank
                then gets the full cache.

        Raises:
            ValueError: If there are no examples.
        """
        # A rank without a batch does not know the shapes, but all-gathers the same dtypes.
        empty = {name: torch.empty(0, dtype=torch.int64 if name == "labels" else torch.float64) for name in self._parts}
        num_classes = max((logits.shape[1] for logits in self._parts["logits"]), default=0)
        if distributed:
            num_classes = max(gather_number(num_classes))
        full = {
            name: _joined(name, values, num_classes) if values else empty[name] for name, values in self._parts.items()
        }
        if distributed:
            full = {name: gather_examples(values) for name, values in full.items()}
        if not len(full["logits"]):
            raise ValueError(
                "no validation examples: nothing can be fitted on an empty calibration split; add examples"
            )
        labels = full.pop("labels")
        return ValidationCache(
            **full, labels=None if bool((labels == NO_LABEL).all()) else labels, centres=self._centres
        )


def _joined(name: str, parts: Sequence[Tensor], num_classes: int) -> Tensor:
    """Concatenate one of the tensors of all batches; a class that a batch does not have is absent there."""
    if name == "labels":
        return torch.cat(list(parts))
    if name == "logits":
        return joined_logits(parts, num_classes)
    # The last dimensions are the K - 1 contrasts, or the K classes and the contrasts; those of absent classes are zero.
    rows = num_classes if name == "embedding" else num_classes - 1
    sizes = [(part.shape[-1], part.shape[-2]) for part in parts]
    padding = [(0, num_classes - 1 - columns, 0, rows - found) for columns, found in sizes]
    return torch.cat([torch.nn.functional.pad(part, by) for part, by in zip(parts, padding, strict=True)])


def cache_terms(
    batches: Iterable[BatchTerms], curvature: Sequence[Tensor], *, distributed: bool = False
) -> ValidationCache:
    """Cache the terms of a validation set in one pass; see `CacheBuilder`.

    Args:
        batches: Centred terms of each batch.
        curvature: Eigenvalues `s_qp` of each layer, `[E, r_g, r_a]`.
        distributed: Whether all ranks call this; see `CacheBuilder.finish`.

    Raises:
        ValueError: If there are no examples.
    """
    builder = CacheBuilder(curvature)
    for terms in batches:
        builder.add(terms)
    return builder.finish(distributed=distributed)


def _bin_centres_of(curvature: Sequence[Tensor]) -> Tensor:
    """The bin centres of every layer, `[L, bins]`; no bins if no layer has any curvature (rank 0)."""
    if not any(s.numel() for s in curvature):
        return torch.empty(len(curvature), 0, dtype=torch.float64)
    return torch.stack([_bin_centres(s) for s in curvature])


def _bin_centres(curvature: Tensor) -> Tensor:
    """Bin centres `[bins]`, evenly spaced in log s over the twelve decades below the largest s."""
    largest = max(float(curvature.max()), torch.finfo(torch.float32).tiny)
    return torch.logspace(math.log10(largest) - 12, math.log10(largest), _NUM_BINS, dtype=torch.float64)


def _bin_products(projections: Tensor, examples: Tensor, s: Tensor, centres: Tensor, num_examples: int) -> Tensor:
    """Sum `R_i,qp R_j,qp` of each example in bins of s: `[B, bins, P, P]` float64.

    Args:
        projections: Projections `[N, P, r_g, r_a]` of each group.
        examples: Example `[N]` of each group.
        s: Eigenvalues `[N, r_g, r_a]`.
        centres: Bin centres `[bins]`.
        num_examples: Number of examples B.
    """
    num_contrasts = projections.shape[1]
    if not len(centres):
        return projections.new_zeros(num_examples, 0, num_contrasts, num_contrasts, dtype=torch.float64)
    rows = projections.double().flatten(2)  # [N, P, Q]
    products = rows.unsqueeze(1) * rows.unsqueeze(2)  # [N, P, P, Q]
    low, high = math.log(centres[0]), math.log(centres[-1])
    # s = 0 contributes nothing; in the lowest bin its contribution is below rounding.
    position = (s.double().flatten(1).clamp(min=float(centres[0])).log() - low) / (high - low) * (len(centres) - 1)
    lower = position.floor().clamp(0, len(centres) - 2)
    upper_share = position - lower
    sums = products.new_zeros(num_examples * len(centres), num_contrasts, num_contrasts)
    for index, share in ((lower.long(), 1 - upper_share), (lower.long() + 1, upper_share)):
        target = (examples.unsqueeze(1) * len(centres) + index).flatten()
        values = (products * share[:, None, None]).permute(0, 3, 1, 2).flatten(0, 1)
        sums.index_add_(0, target, values)
    return sums.view(num_examples, len(centres), num_contrasts, num_contrasts)
