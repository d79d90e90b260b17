"""The prior precision from the evidence, or from a validation set (Laplace prior optimisation, LPO)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bmoe_lightning.experts.logits_contract import NO_LABEL, checked_labels, joined_logits
from bmoe_lightning.laplace.covariance import BatchTerms
from bmoe_lightning.laplace.predictive import standard_normal
from bmoe_lightning.utils.distributed import gather_examples, gather_number
from bmoe_lightning.utils.fit_warnings import warn_of_fit

Scope = Literal["global", "layer"]
SCOPES: tuple[Scope, ...] = ("global", "layer")

LOG_PRECISION_RANGE = (math.log(1e-8), math.log(1e12))
_NUM_BINS = 128
_LPO_RANGE = (math.log(1e-4), math.log(1e8))
_GOLDEN_STEPS = 15  # to .002 in log precision


def log_evidence_penalty(curvature: Sequence[Tensor], squared_distances: Sequence[Tensor], precision: Tensor) -> Tensor:
    """`log p(D | lambda) - log p(D | W*)` of the Laplace approximation.

    The terms `D log lambda` of the prior and of the determinant cancel. (Eq. 12 and Algorithm 2 of the paper,
    https://arxiv.org/abs/2511.08968, have both remaining terms with the opposite sign, for minimisation.)

    Args:
        curvature: Eigenvalues `s_qp` of each layer, `[E, r_g, r_a]` float64.
        squared_distances: Distances `||W_e - M_e||^2` of each layer, `[E]` float64.
        precision: Prior precision `[L]` float64.

    Returns:
        A float64 scalar, `-1/2 sum_e [lambda ||W_e - M_e||^2 + sum_qp log(1 + s_qp / lambda)]`.
    """
    total = precision.new_zeros(())
    for s, distances, value in zip(curvature, squared_distances, precision, strict=True):
        total = total - 0.5 * (value * distances.to(value).sum() + torch.log1p(s.to(value) / value).sum())
    return total


def fit_evidence(curvature: Sequence[Tensor], squared_distances: Sequence[Tensor], scope: Scope = "layer") -> Tensor:
    """The prior precision at which the evidence is stationary: `sum s / (lambda + s) = lambda ||W - M||^2`.

    The fixed point of MacKay 1992 (https://doi.org/10.1162/neco.1992.4.5.720). The left side decreases in lambda, the
    right side increases, so the root is unique; it is found by bisection in log lambda.

    Args:
        curvature: Eigenvalues `s_qp` of each layer, `[E, r_g, r_a]` float64.
        squared_distances: Distances `||W_e - M_e||^2` of each layer, `[E]`.
        scope: Scope of the prior precision: one per layer (`layer`), or a single one (`global`).

    Returns:
        Prior precision `[L]` float64.

    Raises:
        ValueError: If the scope is unknown, the weights equal the prior mean (the evidence then increases in lambda
            without bound), or the curvature is zero.
    """
    check_distances(squared_distances)
    spectra = [s.double().flatten().cpu() for s in curvature]
    distances = torch.stack([d.double().sum().cpu() for d in squared_distances])
    if scope == "layer":
        return torch.stack([_stationary(s, distance) for s, distance in zip(spectra, distances, strict=True)])
    if scope == "global":
        return _stationary(torch.cat(spectra), distances.sum()).expand(len(spectra)).clone()
    raise ValueError(f"unknown scope {scope!r}; valid are global, layer")


def check_distances(squared_distances: Sequence[Tensor]) -> None:
    """Check that the evidence has a maximum at these distances from the prior mean.

    Args:
        squared_distances: Distances `||W_e - M_e||^2` of each layer, `[E]`.

    Raises:
        ValueError: If the distance of a layer is zero or not finite.
    """
    totals = [float(distances.double().sum()) for distances in squared_distances]
    if not all(math.isfinite(total) for total in totals):
        raise ValueError(
            "the distance of the expert weights from the prior mean is not finite: the weights or the prior mean "
            "contain NaN or infinity; load a checkpoint from before training diverged"
        )
    if not all(total > 0 for total in totals):
        raise ValueError(
            "the expert weights equal the prior mean, so the evidence has no maximum. Fine-tune the model, capture the "
            "prior mean before that, or use a prior mean of zero."
        )


def _stationary(spectrum: Tensor, distance: Tensor) -> Tensor:
    if not float(spectrum.sum()) > 0:
        raise ValueError(
            "the curvature is zero everywhere: no slot affected a logit; check that the data use these layers"
        )
    low, high = LOG_PRECISION_RANGE
    for _ in range(80):
        middle = (low + high) / 2
        precision = math.exp(middle)
        if float((spectrum / (precision + spectrum)).sum()) > precision * float(distance):
            low = middle
        else:
            high = middle
    return torch.tensor(math.exp((low + high) / 2), dtype=torch.float64)


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


def fit_lpo(
    cache: ValidationCache, scope: Scope = "layer", *, num_samples: int = 1000, seed: int = 0, max_iterations: int = 60
) -> Tensor:
    """Minimise the validation NLL of the MC predictive over the log prior precision.

    Laplace prior optimisation follows Yang et al. 2023 (https://arxiv.org/abs/2308.13111). Common random numbers make
    the objective smooth and deterministic, so a line search and L-BFGS replace 1000 Adam steps. The line search fits a
    single precision; `layer` starts L-BFGS from there and returns the best iterate.

    Args:
        cache: Cache of the validation set.
        scope: Scope of the prior precision: one per layer (`layer`), or a single one (`global`).
        num_samples: Number of Monte Carlo samples of the objective.
        seed: Seed for the Monte Carlo noise.
        max_iterations: Maximum number of L-BFGS iterations.

    Returns:
        Prior precision `[L]` float64.

    Raises:
        ValueError: If the scope is unknown, there are no labels, or the objective is not finite.

    Warns:
        FitWarning: If the prior precisions are at an end of the search range.
    """
    if scope not in ("global", "layer"):
        raise ValueError(f"unknown scope {scope!r}; valid are global, layer")
    objective = _Objective(cache, num_samples, seed)
    num_layers = len(cache.centres)
    start = _line_search(lambda x: float(objective(torch.full((num_layers,), x, dtype=torch.float64))))
    log_precision = torch.full((num_layers,), start, dtype=torch.float64)
    if scope == "layer" and num_layers > 1:
        log_precision = _quasi_newton(objective, log_precision, max_iterations)
    if not math.isfinite(float(objective(log_precision))):
        raise ValueError("the validation NLL is not finite; check labels and logits of the calibration split")
    if all(min(abs(x - end) for end in _LPO_RANGE) < 0.1 for x in log_precision.tolist()):
        reached = ", ".join(f"{x:.3g}" for x in log_precision.exp().tolist())
        warn_of_fit(
            f"LPO ended at the limit of its search range (prior precisions {reached}): no finite prior precision is "
            "optimal on this validation set, so predictions are those of the MAP or nearly uniform; add labels",
            stacklevel=2,
        )
    return log_precision.exp()


class _Objective:
    """Mean validation NLL of the MC predictive as a function of the log precisions `[L]`."""

    def __init__(self, cache: ValidationCache, num_samples: int, seed: int) -> None:
        if cache.labels is None:
            raise ValueError("LPO needs labels, but class_logits returned None for them; return (logits, labels)")
        self._cache = cache
        self._labels = checked_labels(cache.labels, cache.logits)
        self._noise = standard_normal(num_samples, cache.embedding.shape[2], seed)

    def __call__(self, log_precision: Tensor) -> Tensor:
        cache = self._cache
        contrast = cache.contrast_covariance(log_precision.exp())
        # Cholesky instead of an eigendecomposition: it is differentiable at repeated eigenvalues.
        trace = contrast.diagonal(dim1=1, dim2=2).sum(1).clamp(min=1e-12).view(-1, 1, 1)
        jitter = 1e-6 * trace * torch.eye(contrast.shape[1], dtype=contrast.dtype)
        root = cache.embedding @ torch.linalg.cholesky(contrast + jitter)
        # Samples in the last dimension: reductions over the few classes there would dominate the runtime.
        samples = cache.logits.unsqueeze(2) + root @ self._noise.mT  # [N, K, S]
        chosen = samples.gather(1, self._labels.view(-1, 1, 1).expand(-1, 1, len(self._noise))).squeeze(1)
        log_probs = chosen - samples.logsumexp(1)
        return -(torch.logsumexp(log_probs, dim=1) - math.log(len(self._noise))).mean()


def _line_search(objective: Callable[[float], float]) -> float:
    """Minimise over one log precision: a coarse grid, then golden-section search around its best point."""
    low, high = _LPO_RANGE
    grid = torch.linspace(low, high, 25).tolist()
    with torch.no_grad():
        values = [objective(x) for x in grid]
        best = min(range(len(grid)), key=lambda i: values[i] if math.isfinite(values[i]) else math.inf)
        left, right = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
        ratio = (math.sqrt(5) - 1) / 2
        first, second = right - ratio * (right - left), left + ratio * (right - left)
        at_first, at_second = objective(first), objective(second)
        for _ in range(_GOLDEN_STEPS):
            # One of the two interior points is reused in the next interval.
            if at_first < at_second:
                right, second, at_second = second, first, at_first
                first = right - ratio * (right - left)
                at_first = objective(first)
            else:
                left, first, at_first = first, second, at_second
                second = left + ratio * (right - left)
                at_second = objective(second)
        candidates = [(values[best], grid[best]), (objective((left + right) / 2), (left + right) / 2)]
    return min(candidates)[1]


def _quasi_newton(objective: Callable[[Tensor], Tensor], start: Tensor, max_iterations: int) -> Tensor:
    variable = start.clone().requires_grad_()
    best = (float(objective(start)), start)
    optimiser = torch.optim.LBFGS(
        [variable], max_iter=max_iterations, line_search_fn="strong_wolfe", tolerance_change=1e-7
    )

    def closure() -> float:
        nonlocal best
        optimiser.zero_grad()
        clamped = variable.clamp(*_LPO_RANGE)
        value = objective(clamped)
        value.backward()
        if value.item() < best[0]:
            best = (value.item(), clamped.detach().clone())
        return value.item()

    with torch.enable_grad():
        optimiser.step(closure)
    return best[1]


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
