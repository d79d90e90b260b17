"""Covariance terms of a validation set, from which its predictions follow for any prior precision."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bmoe_lightning.curvature.spec import CACHE_BYTES
from bmoe_lightning.experts.logits_contract import NO_LABEL, checked_labels, joined_logits
from bmoe_lightning.laplace.compact_cache import (
    CompactCache,
    Nodes,
    cholesky,
    compact_products,
    compact_terms,
)
from bmoe_lightning.laplace.covariance import BatchTerms, without_absent_classes
from bmoe_lightning.laplace.covariance_cache import CovarianceCache
from bmoe_lightning.laplace.predictive import standard_normal
from bmoe_lightning.laplace.present import of_classes, present_first
from bmoe_lightning.utils.distributed import failing_together, gather_examples, gather_number, num_processes
from bmoe_lightning.utils.fit_warnings import warn_of_fit

_NUM_BINS = 128
_MANY_CLASSES = 6  # contrasts of the classes that an example has
_COMPACT = ("logits", "labels", "directions", "diagonal", "pieces", "examples")
_DTYPES = {"labels": torch.int64, "pieces": torch.float32, "examples": torch.int64}
# Temporary floats per chunk of groups.
_CHUNK_FLOATS = 1 << 23
# Sampled logits of one chunk of examples.
_SAMPLED_FLOATS = 1 << 22


@dataclass(frozen=True)
class ValidationCache(CovarianceCache):
    """Logits and covariance terms of a validation set, from which predictions follow for any prior precision.

    The projections enter a covariance only through `s / (lambda + s)`, a smooth function of log s. So their products
    are summed in bins of log s, interpolated linearly between the two nearest bin centres.

    Attributes:
        embedding: Matrix `[N, K, P]` from contrasts to logits.
        prior: Inner products `<G_i, G_j>`, `[N, L, P, P]`.
        binned: Sums of `R_i R_j` per bin, `[N, L, bins, P, P]`.
        centres: Eigenvalue s at the centre of each bin, `[L, bins]`.
    """

    embedding: Tensor
    prior: Tensor
    binned: Tensor
    centres: Tensor

    @property
    def num_layers(self) -> int:
        """Number of layers L."""
        return len(self.centres)

    @property
    def is_exact(self) -> bool:
        """True: all examples have exact terms."""
        return True

    @property
    def terms(self) -> tuple[Tensor, ...]:
        """The covariance terms of the examples."""
        return self.embedding, self.prior, self.binned

    def noise(self, num_samples: int, seed: int, num_deviations: int = 0) -> Tensor:
        """Standard normal noise `[S, P + R]` for `nll`."""
        return standard_normal(num_samples, self.embedding.shape[2] + num_deviations, seed)

    def nll(self, precision: Tensor, noise: Tensor, labels: Tensor, deviations: Tensor | None = None) -> Tensor:
        """Mean NLL of the MC predictive at precisions `[L]`; see `CovarianceCache`."""
        contrast = self.contrast_covariance(precision)
        # Cholesky instead of an eigendecomposition: it is differentiable at repeated eigenvalues.
        trace = contrast.diagonal(dim1=1, dim2=2).sum(1).clamp(min=1e-12).view(-1, 1, 1)
        jitter = 1e-6 * trace * torch.eye(contrast.shape[1], dtype=contrast.dtype)
        classes = present_first(self.logits)
        root = of_classes(self.embedding, classes) @ cholesky(contrast + jitter)
        if deviations is not None:
            root = torch.cat([root, of_classes(deviations, classes)], dim=2)
        logits, chosen = of_classes(self.logits, classes), (classes == labels.unsqueeze(1)).int().argmax(1)
        size = max(1, _SAMPLED_FLOATS // (len(noise) * classes.shape[1]))
        parts = [part.split(size) for part in (logits, root, chosen)]
        if len(parts[0]) == 1:
            return _summed_nll(parts[0][0], parts[1][0], parts[2][0], noise) / len(labels)
        # The samples of one chunk at a time: they are computed again for its gradient.
        losses = [checkpoint(_summed_nll, *part, noise, use_reentrant=False) for part in zip(*parts, strict=True)]
        return torch.stack(losses).sum() / len(labels)

    def contrast_covariance(self, precision: Tensor) -> Tensor:
        """The covariance of the contrasts at precisions `[L]`: `[N, P, P]`."""
        values = precision.unsqueeze(1)
        shrinkage = self.centres / (values * (values + self.centres))
        prior = _weighted_sum(1 / precision, self.prior.flatten(2))
        explained = _weighted_sum(shrinkage.flatten(), self.binned.flatten(3).flatten(1, 2))
        return (prior - explained).view(-1, *self.prior.shape[2:])

    def covariance(self, precision: Tensor) -> Tensor:
        """The covariance of the centred logits at precisions `[L]`: `[N, K, K]`."""
        return self.embedding @ self.contrast_covariance(precision) @ self.embedding.mT


def _summed_nll(logits: Tensor, root: Tensor, labels: Tensor, noise: Tensor) -> Tensor:
    # Samples in the last dimension: reductions over the few classes there would dominate the runtime.
    samples = torch.baddbmm(logits.unsqueeze(2), root, noise.mT.expand(len(root), -1, -1))  # [n, C, S]
    chosen = samples.gather(1, labels.view(-1, 1, 1).expand(-1, 1, len(noise))).squeeze(1)
    log_probs = chosen - samples.logsumexp(1)
    return -(torch.logsumexp(log_probs, dim=1) - math.log(len(noise))).sum()


def _weighted_sum(weights: Tensor, terms: Tensor) -> Tensor:
    """The sum of terms `[N, M, C]` with weights `[M]`: `[N, C]`.

    As a batched product it reads the terms where they are; einsum and matmul copy them, at several times the cost.
    """
    return torch.bmm(weights.view(1, 1, -1).expand(len(terms), -1, -1), terms).squeeze(1)


def exact_terms_fit(num_contrasts: int, num_bytes: int, max_bytes: int) -> bool:
    """Whether exact terms are stored; see `CacheBuilder`."""
    return num_bytes <= (max_bytes if num_contrasts < _MANY_CLASSES else max_bytes // 32)


class CacheBuilder:
    """Collects the covariance terms of a validation set batch by batch, on the CPU, within a stated memory.

    With few classes (at most 6 for each example) the exact terms are stored while they fit. With more, LPO's time would
    grow with them, so they are stored up to 1/32 of the memory. Otherwise the terms are compact, see `CompactCache`;
    and if even these do not fit, those of a random subset of the examples.

    Args:
        curvature: Eigenvalues `s_qp` of each layer, `[E, r_g, r_a]`.
        max_bytes: Memory of the terms of the full set; with several ranks, of all their shards.
        num_shards: Number of ranks among which the set is distributed.
    """

    def __init__(self, curvature: Sequence[Tensor], *, max_bytes: int = CACHE_BYTES, num_shards: int = 1) -> None:
        if max_bytes < 1:
            raise ValueError(f"the memory of the covariance terms must be at least 1 byte, got {max_bytes}")
        self._curvature = list(curvature)
        self._centres = _bin_centres_of(self._curvature)
        self._num_shards = num_shards
        self._max_bytes = max_bytes // num_shards
        self._logits: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._exact: list[dict[str, Tensor]] = []
        self._compact: list[dict[str, Tensor]] = []
        self._nodes: Nodes | None = None
        self._weights: list[Tensor] = []
        self._share = 1.0
        self._num_appended = 0
        self._generator = torch.Generator().manual_seed(0)

    def add(self, terms: BatchTerms) -> None:
        """Add the centred terms of one batch."""
        terms = without_absent_classes(terms)
        size = len(terms.logits)
        self._logits.append(terms.logits.cpu())
        # A placeholder for missing labels, so that all ranks all-gather the same tensors.
        missing = torch.full((size,), NO_LABEL)
        labels = missing if terms.labels is None else checked_labels(terms.labels, terms.logits, values=False)
        self._labels.append(labels.cpu())
        if self._nodes is None and self._fits(terms):
            self._exact.append(self._exact_terms(terms))
            return
        self._make_compact()
        self._append(compact_terms(terms, self._weights), self._logits[-1], self._labels[-1])

    def finish(self, *, distributed: bool = False) -> CovarianceCache:
        """The cache of all batches.

        Args:
            distributed: Whether all ranks call this, each with its shard of the set (see `gather_examples`); every rank
                then gets the full cache.

        Raises:
            ValueError: If there are no examples.
        """
        num_classes = max((logits.shape[1] for logits in self._logits), default=0)
        num_contrasts = max((part["embedding"].shape[2] for part in self._exact), default=0)
        is_compact = self._nodes is not None
        if distributed:
            num_classes = max(gather_number(num_classes))
            num_contrasts = max(gather_number(num_contrasts))
            is_compact = any(gather_number(int(is_compact)))
        share = self._share
        if distributed:  # halvings, so that the exponent is a small integer
            share = 2.0 ** -max(gather_number(round(-math.log2(share))))
        columns = {"logits": list(self._logits), "labels": list(self._labels)}
        sizes = (num_classes, num_contrasts)
        everything = self._gathered(columns, sizes, distributed=distributed)
        if not len(everything["logits"]):
            raise ValueError(
                "no validation examples: nothing can be fitted on an empty calibration split; add examples"
            )
        known = everything["labels"] if bool((everything["labels"] != NO_LABEL).any()) else None
        if not is_compact:
            columns = {name: [part.pop(name) for part in self._exact] for name in ("embedding", "prior", "binned")}
            full = self._gathered(columns, sizes, distributed=distributed)
            return ValidationCache(everything["logits"], known, **full, centres=self._centres)
        nodes = self._make_compact()
        chosen = [_below(part, share) for part in self._compact]
        self._compact = []
        columns = {name: [part.pop(name) for part in chosen] for name in _COMPACT}
        full = self._gathered(columns, sizes, distributed=distributed, even=share < 1)
        labels_of, binned = full.pop("labels"), full.pop("pieces")
        if distributed:  # in the order of the data set, see `gather_examples`
            full["examples"] = full["examples"] * self._num_shards + torch.arange(len(labels_of)) % self._num_shards
        if len(labels_of) < len(everything["labels"]):
            warn_of_fit(
                f"the covariance terms of {len(everything['labels'])} held-out examples take more than "
                f"{self._max_bytes / 2**20:.4g} MiB, so {len(labels_of)} drawn ones of them were used; give "
                "the curvature more memory to use all, as in Curvature(cache_bytes=2**30)"
            )
        return CompactCache(
            **full,
            binned=binned,
            labels=None if known is None else labels_of,
            nodes=nodes.values,
            everything=(everything["logits"], known),
        )

    def _gathered(
        self, columns: dict[str, list[Tensor]], sizes: tuple[int, int], *, distributed: bool, even: bool = False
    ) -> dict[str, Tensor]:
        """Concatenate the tensors of all batches, and of all ranks; `even` leaves equally many examples to each."""
        # A rank without a batch does not know the shapes, but all-gathers the same dtypes.
        full = {
            name: _joined(name, parts, *sizes) if parts else torch.empty(0, dtype=_DTYPES.get(name, torch.float64))
            for name, parts in columns.items()
        }
        if not distributed:
            return full
        if even:
            count = min(gather_number(len(next(iter(full.values())))))
            full = {name: values[:count] for name, values in full.items()}
        return {name: gather_examples(values) for name, values in full.items()}

    def _fits(self, terms: BatchTerms) -> bool:
        """Whether the exact terms fit, with those of one more batch."""
        contrasts = terms.embedding.shape[2]
        added = len(terms.logits) * 8 * contrasts**2 * (self._centres.numel() + len(self._centres))
        held = sum(part[name].nbytes for part in self._exact for name in ("prior", "binned"))
        return exact_terms_fit(contrasts, held + added, self._max_bytes)

    def _exact_terms(self, terms: BatchTerms) -> dict[str, Tensor]:
        size = len(terms.logits)
        binned = [
            _bin_products(
                layer.projections, layer.examples, s.to(layer.experts.device)[layer.experts], grid, size
            ).cpu()
            for layer, s, grid in zip(terms.layers, self._curvature, self._centres, strict=True)
        ]
        return {
            "embedding": terms.embedding.cpu(),
            "prior": torch.stack([layer.prior.to(terms.embedding) for layer in terms.layers], dim=1).cpu(),
            "binned": torch.stack(binned, dim=1),
        }

    def _make_compact(self) -> Nodes:
        """Go over to compact terms, those of earlier batches too."""
        if self._nodes is None:
            self._nodes = Nodes(self._curvature)
            self._weights = [self._nodes.weights(layer) for layer in range(len(self._curvature))]
            of_bins = [self._nodes.weights(layer, s) for layer, s in enumerate(self._centres)]
            stacked = torch.stack(of_bins).double()
            for logits, labels in zip(self._logits[: len(self._exact)], self._labels, strict=False):
                part = self._exact.pop(0)
                products = compact_products(logits, part["embedding"], part["prior"], part["binned"], stacked)
                self._append(products, logits, labels)
        return self._nodes

    def _append(self, terms: dict[str, Tensor], logits: Tensor, labels: Tensor) -> None:
        """Store the terms of a random share of the examples: half as many whenever the memory is full."""
        draw = torch.rand(len(logits), generator=self._generator, dtype=torch.float64)
        examples = torch.arange(self._num_appended, self._num_appended + len(logits))
        self._num_appended += len(logits)
        columns = {**terms, "logits": logits, "labels": labels, "draw": draw, "examples": examples}
        self._compact.append(_below(columns, self._share))
        while sum(part["pieces"].nbytes for part in self._compact) > self._max_bytes:
            self._share /= 2
            self._compact = [_below(part, self._share) for part in self._compact]


def _below(part: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """The examples whose draw is below a share."""
    kept = part["draw"] < share
    return part if bool(kept.all()) else {name: values[kept] for name, values in part.items()}


def _joined(name: str, parts: list[Tensor], num_classes: int, num_contrasts: int) -> Tensor:
    """Concatenate one of the tensors of all batches; a class that a batch does not have is absent there.

    The list is emptied on the way, so that both are not in memory at once.
    """
    if name == "logits":
        return joined_logits(parts, num_classes)
    # Sizes of the last dimensions; the entries of absent classes are zero.
    wanted: tuple[int, ...] = {
        "embedding": (num_classes, num_contrasts),
        "prior": (num_contrasts, num_contrasts),
        "binned": (num_contrasts, num_contrasts),
        "directions": (num_classes, parts[0].shape[-1]),
        "diagonal": (num_classes,),
    }.get(name, parts[0].shape[1:])
    joined = parts[0].new_zeros(sum(map(len, parts)), *parts[0].shape[1 : parts[0].dim() - len(wanted)], *wanted)
    first = 0
    while parts:
        part = parts.pop(0)
        sizes = part.shape[part.dim() - len(wanted) :]
        target = joined[first : first + len(part)]
        for dimension, size in zip(range(part.dim() - len(wanted), part.dim()), sizes, strict=True):
            target = target.narrow(dimension, 0, size)
        target.copy_(part)
        first += len(part)
    return joined


def cache_terms(
    batches: Iterable[BatchTerms],
    curvature: Sequence[Tensor],
    *,
    distributed: bool = False,
    max_bytes: int = CACHE_BYTES,
) -> CovarianceCache:
    """Cache the terms of a validation set in one pass; see `CacheBuilder`.

    Args:
        batches: Centred terms of each batch.
        curvature: Eigenvalues `s_qp` of each layer, `[E, r_g, r_a]`.
        distributed: Whether all ranks call this; see `CacheBuilder.finish`.
        max_bytes: Memory of the terms.

    Raises:
        ValueError: If there are no examples.
    """
    builder = CacheBuilder(curvature, max_bytes=max_bytes, num_shards=num_processes() if distributed else 1)
    with failing_together(distributed=distributed):
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
    low, high = math.log(centres[0]), math.log(centres[-1])
    # s = 0 contributes nothing; in the lowest bin its contribution is below rounding.
    position = (s.double().flatten(1).clamp(min=float(centres[0])).log() - low) / (high - low) * (len(centres) - 1)
    lower = position.floor().clamp(0, len(centres) - 2)
    upper_share = position - lower
    sums = projections.new_zeros(num_examples * len(centres), num_contrasts, num_contrasts, dtype=torch.float64)
    size = max(1, _CHUNK_FLOATS // max(1, position.shape[1] * num_contrasts**2))
    for index, share in ((lower.long(), 1 - upper_share), (lower.long() + 1, upper_share)):
        # The order of additions does not depend on the size of the chunks.
        for chunk in torch.arange(len(projections), device=projections.device).split(size):
            rows = projections[chunk].double().flatten(2)  # [n, P, Q]
            products = rows.unsqueeze(1) * rows.unsqueeze(2) * share[chunk][:, None, None]  # [n, P, P, Q]
            target = (examples[chunk].unsqueeze(1) * len(centres) + index[chunk]).flatten()
            sums.index_add_(0, target, products.permute(0, 3, 1, 2).flatten(0, 1))
    return sums.view(num_examples, len(centres), num_contrasts, num_contrasts)
