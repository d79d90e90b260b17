"""Covariance terms of a large validation set with many classes, in a bounded amount of memory.

The exact terms grow with K^2. Here each example's covariance is a low-rank matrix plus a diagonal,

    Lambda(lambda) ~ E c(lambda) E^T + rho(lambda) diag(d),                E [K, q], c [q, q], d [K],

whose directions `E` are the leading ones of the example's prior covariance, weighted by tempered class probabilities: a
class that is never predicted takes no direction. `rho` makes the trace exact. `c` and the trace are sums of the terms
`1 / (lambda + s)` over all eigenvalues s of the curvature; they are stored at a few nodes in log s, to which Lagrange
interpolation distributes each term. Shapes: `B` examples, `P` contrasts, `C = q (q + 1) / 2 + 1` stored numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from bmoe_lightning.laplace.covariance import BatchTerms
from bmoe_lightning.laplace.covariance_cache import CovarianceCache
from bmoe_lightning.laplace.predictive import standard_normal
from bmoe_lightning.laplace.present import of_classes, present_first
from bmoe_lightning.laplace.slot_terms import LayerTerms

MAX_DIRECTIONS = 8
"""Maximum number of directions q of an example's covariance."""

_NODE_SPACING = 0.75  # in log s
_ORDER = 6  # nodes that share a term
_NUM_DECADES = 12
_TEMPERATURE = 2.0
_MIN_WEIGHT = 1e-3
_NEGLIGIBLE = 1e-10  # eigenvalue, beside the largest
_CHUNK_FLOATS = 1 << 22
# Sampled logits of one evaluation of the objective; more examples get fewer samples each.
_SAMPLED_FLOATS = 3 << 20
_MIN_SAMPLES = 100


@dataclass(frozen=True)
class CompactCache(CovarianceCache):
    """Logits and compact covariance terms of a validation set; see the module.

    Attributes:
        directions: Directions `E`, `[N, K, q]` float64.
        diagonal: Diagonal `d`, `[N, K]` float64, whose centred trace is 1; zero where nothing is left to it.
        binned: `[N, C, L (1 + nodes)]` float32: for each layer what no eigenvalue shrinks, then the terms at each node.
        nodes: Eigenvalues s of the nodes, `[L, nodes]` float64.
        everything: Logits `[M, K]` and labels of all examples of the set, M >= N.
        examples: Positions of the N examples among all, `[N]` int64; None if they are the first ones.
    """

    directions: Tensor
    diagonal: Tensor
    binned: Tensor
    nodes: Tensor
    everything: tuple[Tensor, Tensor | None]
    examples: Tensor | None = None

    @property
    def num_layers(self) -> int:
        """Number of layers L."""
        return len(self.nodes)

    @property
    def is_exact(self) -> bool:
        """False: exact terms did not fit into the memory."""
        return False

    @property
    def terms(self) -> tuple[Tensor, ...]:
        """The covariance terms of the examples."""
        return self.binned, self.directions, self.diagonal

    def positions(self) -> Tensor:
        """Positions `[N]` int64, among all examples of the set, of those that have terms."""
        return super().positions() if self.examples is None else self.examples

    def all_examples(self) -> tuple[Tensor, Tensor | None]:
        """Logits `[M, K]` and labels `[M]` (or None) of all examples of the set, also of those without terms."""
        return self.everything

    def noise(self, num_samples: int, seed: int, num_deviations: int = 0) -> Tensor:
        """Standard normal noise `[S, q + C + R]` for `nll`, in antithetic pairs; S is even and at most `num_samples`.

        C is the largest number of classes that an example has.
        """
        num_present = present_first(self.logits).shape[1]
        count = min(num_samples, max(_MIN_SAMPLES, _SAMPLED_FLOATS // (len(self.logits) * num_present)))
        num_columns = self.directions.shape[2] + num_present + num_deviations
        half = standard_normal(max(1, count // 2), num_columns, seed)
        return torch.cat([half, -half])

    def covariance(self, precision: Tensor) -> Tensor:
        """The covariance of the centred logits at precisions `[L]`: `[N, K, K]` float64."""
        inner, variances = self._at(precision)
        present = (self.logits != -torch.inf).double()
        centring = torch.diag_embed(present) - present.unsqueeze(2) * present.unsqueeze(1) / present.sum(1).view(
            -1, 1, 1
        )
        return centring @ (self.directions @ inner @ self.directions.mT + torch.diag_embed(variances)) @ centring

    def nll(self, precision: Tensor, noise: Tensor, labels: Tensor, deviations: Tensor | None = None) -> Tensor:
        """Mean NLL of the MC predictive at precisions `[L]`; see `CovarianceCache`."""
        classes = present_first(self.logits)
        inner, variances = self._at(precision)
        trace = inner.diagonal(dim1=1, dim2=2).sum(1).clamp(min=1e-12).view(-1, 1, 1)
        jitter = 1e-6 * trace * torch.eye(inner.shape[1], dtype=inner.dtype)
        root = (of_classes(self.directions, classes) @ cholesky(inner + jitter)).float()
        spread = (of_classes(variances, classes) + 1e-12).sqrt().float()
        logits, labels = of_classes(self.logits, classes).float(), (classes == labels.unsqueeze(1)).int().argmax(1)
        noise = noise.float()
        if deviations is not None:
            of_root, of_spread, of_deviations = noise.split([root.shape[2], classes.shape[1], deviations.shape[2]], 1)
            noise = torch.cat([of_root, of_deviations, of_spread], dim=1)
            root = torch.cat([root, of_classes(deviations, classes).float()], dim=2)
        size = max(1, _SAMPLED_FLOATS // (noise.shape[0] * classes.shape[1]))
        parts = [part.split(size) for part in (logits, root, spread, labels)]
        if len(parts[0]) == 1:
            return _summed_nll(parts[0][0], parts[1][0], parts[2][0], parts[3][0], noise) / len(labels)
        # The samples of one chunk at a time: they are drawn again for its gradient.
        losses = [checkpoint(_summed_nll, *part, noise, use_reentrant=False) for part in zip(*parts, strict=True)]
        return torch.stack(losses).sum() / len(labels)

    def _at(self, precision: Tensor) -> tuple[Tensor, Tensor]:
        """The inner covariances `c` `[N, q, q]` and the variances `rho d` `[N, K]` at precisions `[L]`."""
        values = precision.unsqueeze(1)
        weights = torch.cat([1 / values, 1 / (values + self.nodes)], dim=1)
        sums = (self.binned.flatten(0, 1) @ weights.flatten().float()).double().view(self.binned.shape[:2])
        q = self.directions.shape[2]
        rows, columns = torch.triu_indices(q, q)
        examples = torch.arange(len(sums)).unsqueeze(1)
        upper = sums.new_zeros(len(sums), q, q).index_put((examples, rows, columns), sums[:, :-1])
        inner = upper + upper.triu(1).mT
        explained = (self._gram() * inner).sum((1, 2))
        return inner, (sums[:, -1] - explained).clamp(min=0).unsqueeze(1) * self.diagonal

    def _gram(self) -> Tensor:
        """Gram matrices `[N, q, q]` of the centred directions."""
        present = (self.logits != -torch.inf).unsqueeze(2)
        mean = self.directions.sum(1, keepdim=True) / present.sum(1, keepdim=True)
        centred = torch.where(present, self.directions - mean, 0)
        return centred.mT @ centred


def _summed_nll(logits: Tensor, root: Tensor, spread: Tensor, labels: Tensor, noise: Tensor) -> Tensor:
    q = root.shape[2]
    samples = logits.unsqueeze(2) + root @ noise[:, :q].mT + spread.unsqueeze(2) * noise[:, q:].mT  # [n, K, S]
    chosen = samples.gather(1, labels.view(-1, 1, 1).expand(-1, 1, len(noise))).squeeze(1)
    each = (chosen - samples.logsumexp(1)).double()
    count = len(noise) // 2
    pairs = torch.logaddexp(each[:, :count], each[:, count:]) - math.log(2)
    log_probs = torch.logsumexp(pairs, dim=1) - math.log(count)
    # The logarithm of a mean of few samples is too low by half its relative variance, the more so the wider the
    # posterior: left in, that would ask for a larger precision.
    relative = (torch.logsumexp(2 * (pairs - log_probs.unsqueeze(1)), dim=1) - math.log(count)).exp() - 1
    return -(log_probs + (relative / (2 * count)).clamp(max=0.5)).sum()


def cholesky(covariance: Tensor) -> Tensor:
    """A Cholesky factor `[N, P, P]`; of the covariance plus a multiple of I where rounding made it indefinite."""
    root, failed = torch.linalg.cholesky_ex(covariance)
    if not bool(failed.any()):
        return root
    lowest = torch.linalg.eigvalsh(covariance.detach())[:, 0]
    largest = covariance.detach().abs().amax((1, 2))
    lift = torch.where(failed > 0, 2 * lowest.clamp(max=0).abs() + 1e-6 * largest, 0).clamp(min=0)
    return torch.linalg.cholesky(covariance + torch.diag_embed(lift.unsqueeze(1).expand(-1, covariance.shape[1])))


def compact_bytes(num_classes: int, num_layers: int) -> int:
    """Bytes of the compact terms of one example, at most."""
    nodes = math.ceil(_NUM_DECADES * math.log(10) / _NODE_SPACING) + 1
    numbers = MAX_DIRECTIONS * (MAX_DIRECTIONS + 1) // 2 + 1
    return 8 * num_classes * (MAX_DIRECTIONS + 1) + 4 * numbers * num_layers * (1 + nodes)


class Nodes:
    """The nodes in log s of every layer, and the weights with which each eigenvalue is distributed to them.

    Args:
        curvature: Eigenvalues `s_qp` of each layer, `[E, r_g, r_a]`.

    Attributes:
        values: Eigenvalues of the nodes, `[L, nodes]` float64; no nodes if no layer has any curvature.
    """

    def __init__(self, curvature: Sequence[Tensor]) -> None:
        self._curvature = [s.double().flatten(1).cpu() for s in curvature]
        ranges = [_log_range(s) for s in self._curvature]
        if not any(s.numel() for s in self._curvature):
            self.values = torch.empty(len(curvature), 0, dtype=torch.float64)
            return
        count = max(_ORDER, *(math.ceil((high - low) / _NODE_SPACING) + 1 for low, high in ranges))
        logs = [torch.linspace(low, high, count, dtype=torch.float64) for low, high in ranges]
        self.values = torch.stack(logs).exp()

    def weights(self, layer: int, s: Tensor | None = None) -> Tensor:
        """The weights of eigenvalues: Lagrange interpolation in log s.

        Args:
            layer: Position of the layer.
            s: Eigenvalues; by default those of the layer, `[E, r_g r_a]`.

        Returns:
            `[*s.shape, nodes]` float32.
        """
        s, logs = self._curvature[layer] if s is None else s, self.values[layer].log()
        if not len(logs):
            return s.new_zeros(*s.shape, 0).float()
        step = float(logs[1] - logs[0])
        position = (s.clamp(min=torch.finfo(s.dtype).tiny).log() - logs[0]) / step
        # The nodes around s, fewer on one side at the ends.
        first = (position.floor() - _ORDER // 2 + 1).clamp(0, len(logs) - _ORDER)
        x = position - first
        shares = []
        for node in range(_ORDER):
            others = [other for other in range(_ORDER) if other != node]
            factors = torch.stack([(x - other) / (node - other) for other in others])
            shares.append(factors.prod(0))
        # No shrinkage, hence no weight, for s = 0 and for what is negligible beside the largest one.
        lagrange = torch.where((position > -0.5).unsqueeze(-1), torch.stack(shares, dim=-1), 0)
        index = first.long().unsqueeze(-1) + torch.arange(_ORDER)
        return s.new_zeros(*s.shape, len(logs)).scatter_(-1, index, lagrange).float()


def _log_range(s: Tensor) -> tuple[float, float]:
    positive = s[s > 0]
    if not len(positive):
        return -(_ORDER - 1) * _NODE_SPACING, 0.0
    high = math.log(float(positive.max()))
    low = max(math.log(float(positive.min())), high - _NUM_DECADES * math.log(10))
    return min(low, high - (_ORDER - 1) * _NODE_SPACING), high


def compact_terms(terms: BatchTerms, weights: Sequence[Tensor]) -> dict[str, Tensor]:
    """The compact terms of one batch, on the CPU; see `CompactCache`.

    Args:
        terms: Centred terms of the batch.
        weights: Weights of each layer's eigenvalues, from `Nodes.weights`.

    Returns:
        `directions`, `diagonal` and `pieces`.
    """
    embedding = terms.embedding
    prior = sum(layer.prior.to(embedding) for layer in terms.layers)
    assert isinstance(prior, Tensor)
    directions, functionals, diagonal = _directions(terms.logits, embedding, prior)
    pieces = [
        _layer_pieces(layer, functionals, embedding, of_layer)
        for layer, of_layer in zip(terms.layers, weights, strict=True)
    ]
    joined = torch.cat(pieces, dim=2).float()
    return {"directions": directions.cpu(), "diagonal": diagonal.cpu(), "pieces": joined.cpu()}


def compact_products(
    logits: Tensor, embedding: Tensor, prior: Tensor, binned: Tensor, weights: Tensor
) -> dict[str, Tensor]:
    """The compact terms of examples whose exact ones are known in bins of s.

    Args:
        logits: Logits `[B, K]`.
        embedding: Matrix `[B, K, P]` from contrasts to logits.
        prior: Inner products `<G_i, G_j>`, `[B, L, P, P]`.
        binned: Sums of `R_i R_j` per bin, `[B, L, bins, P, P]`.
        weights: Weights `[L, bins, nodes]` of the bins' eigenvalues.

    Returns:
        As of `compact_terms`.
    """
    directions, functionals, diagonal = _directions(logits, embedding, prior.sum(1))
    gram = embedding.mT @ embedding

    def packed(products: Tensor, maps: Tensor, of_trace: Tensor) -> Tensor:
        rows, columns = torch.triu_indices(maps.shape[-2], maps.shape[-2])
        inner = (maps @ products @ maps.mT)[..., rows, columns]
        return torch.cat([inner, (products * of_trace).sum((-2, -1)).unsqueeze(-1)], dim=-1)

    total = packed(prior, functionals.unsqueeze(1), gram.unsqueeze(1))  # [B, L, C]
    of_bins = packed(binned, functionals[:, None, None], gram[:, None, None])  # [B, L, bins, C]
    at_nodes = torch.einsum("nlbc,lbm->nclm", of_bins, weights)
    unshrunk = (total.transpose(1, 2) - at_nodes.sum(3)).unsqueeze(3)
    pieces = torch.cat([unshrunk, at_nodes], dim=3).flatten(2)
    return {"directions": directions, "diagonal": diagonal, "pieces": pieces.float()}


def _directions(logits: Tensor, embedding: Tensor, prior: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Directions `[B, K, q]`, the functionals `[B, q, P]` of the contrasts that they multiply, and `d` `[B, K]`."""
    present = (logits != -torch.inf).to(embedding)
    weights = (logits / _TEMPERATURE).softmax(1) + _MIN_WEIGHT * present
    weights = weights / weights.sum(1, keepdim=True)
    # Subtracting the weighted mean leaves the softmax unchanged, and makes the shift cost nothing.
    shifted = (embedding - weights.unsqueeze(1) @ embedding) * present.unsqueeze(2)
    root = weights.sqrt().unsqueeze(2)
    scaled = root * shifted
    values, vectors = torch.linalg.eigh(scaled @ prior @ scaled.mT)
    vectors = _signed(vectors, present) * (values > _NEGLIGIBLE * values[:, -1:]).unsqueeze(1)
    # Always as many, so that batches of different K have the same sizes.
    missing = max(MAX_DIRECTIONS - values.shape[1], 0)
    leading = pad(vectors[:, :, -MAX_DIRECTIONS:], (missing, 0))
    values = pad(values[:, -MAX_DIRECTIONS:].clamp(min=0), (missing, 0))
    directions = torch.where(present.unsqueeze(2) > 0, leading / root.clamp(min=1e-30), 0)
    left = (shifted @ prior * shifted).sum(2) - (directions.square() * values.unsqueeze(1)).sum(2)
    left = left.clamp(min=0) * present
    centred_trace = left.sum(1) * (1 - 1 / present.sum(1))
    total = (embedding @ prior * embedding).sum((1, 2))
    matters = centred_trace > 1e-9 * total
    diagonal = torch.where(matters.unsqueeze(1), left / centred_trace.clamp(min=1e-300).unsqueeze(1), 0)
    return directions, leading.mT @ scaled, diagonal


def _signed(vectors: Tensor, present: Tensor) -> Tensor:
    """Eigenvectors `[B, K, K]` with signs that do not depend on absent classes, since noise is drawn for each."""
    position = present.cumsum(1)
    # Any function of the position with which no eigenvector is likely to be orthogonal.
    weights = present * (1 + torch.cos(position.square()))
    return vectors * torch.where(weights.unsqueeze(1) @ vectors < 0, -1.0, 1.0)


def _layer_pieces(terms: LayerTerms, functionals: Tensor, embedding: Tensor, weights: Tensor) -> Tensor:
    """The stored numbers `[B, C, 1 + nodes]` float64 of one layer."""
    num_examples, q, _ = functionals.shape
    rows, columns = torch.triu_indices(q, q, device=functionals.device)
    prior = terms.prior.to(embedding)
    inner = functionals @ prior @ functionals.mT
    trace = (embedding @ prior * embedding).sum((1, 2))
    total = torch.cat([inner[:, rows, columns], trace.unsqueeze(1)], dim=1)
    device, dtype = terms.projections.device, terms.projections.dtype
    at_nodes = torch.zeros(num_examples, len(rows) + 1, weights.shape[2], dtype=torch.float64, device=device)
    if weights.shape[1] and weights.shape[2]:
        # One matrix for the functionals and the embedding: [B, q + K, P].
        maps = torch.cat([functionals, embedding], dim=1).to(device, dtype)
        weights = weights.to(device, dtype)
        rows, columns = rows.to(device), columns.to(device)
        floats = weights.shape[1] * (maps.shape[1] + len(rows) + weights.shape[2])
        size = max(1, _CHUNK_FLOATS // floats)
        for projections, examples, experts in zip(
            terms.projections.flatten(2).split(size), terms.examples.split(size), terms.experts.split(size), strict=True
        ):
            mapped = maps[examples] @ projections  # [n, q + K, Q]
            packed = mapped[:, rows] * mapped[:, columns]
            squares = mapped[:, q:].square().sum(1, keepdim=True)
            at_nodes.index_add_(0, examples, (torch.cat([packed, squares], dim=1) @ weights[experts]).double())
    at_nodes = at_nodes.to(embedding)
    return torch.cat([(total - at_nodes.sum(2)).unsqueeze(2), at_nodes], dim=2)
