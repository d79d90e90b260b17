"""The prior precision from the evidence, or from a validation set (Laplace prior optimisation, LPO)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bmoe_lightning.laplace.covariance_cache import CovarianceCache
from bmoe_lightning.utils.fit_warnings import warn_of_fit

Scope = Literal["global", "layer"]
SCOPES: tuple[Scope, ...] = ("global", "layer")

LPO_SAMPLES = 1000
"""Default number of Monte Carlo samples of LPO's objective."""

LOG_PRECISION_RANGE = (math.log(1e-8), math.log(1e12))
# A factor of 1.1 from an end of a search range is at the end.
_AT_END = 0.1
# log lambda has a standard deviation of sqrt(2 / gamma) under the evidence (MacKay 1992): a factor of 7 at this gamma.
_MIN_GAMMA = 0.5
# A change of the summed NLL, in nats, that no test would notice.
_FLAT = 0.1
_LPO_RANGE = (math.log(1e-4), math.log(1e8))
_GOLDEN_STEPS = 15  # to .002 in log precision
_PLATEAU = 1e-3  # nats of mean NLL


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


def fit_evidence(
    curvature: Sequence[Tensor],
    squared_distances: Sequence[Tensor],
    scope: Scope = "layer",
    *,
    names: Sequence[str] = (),
) -> Tensor:
    """The prior precision at which the evidence is stationary: `sum s / (lambda + s) = lambda ||W - M||^2`.

    The fixed point of MacKay 1992 (https://doi.org/10.1162/neco.1992.4.5.720). The left side decreases in lambda, the
    right side increases, so the root is unique; it is found by bisection in log lambda.

    Args:
        curvature: Eigenvalues `s_qp` of each layer, `[E, r_g, r_a]` float64.
        squared_distances: Distances `||W_e - M_e||^2` of each layer, `[E]`.
        scope: Scope of the prior precision: one per layer (`layer`), or a single one (`global`).
        names: Names of the layers, for warnings.

    Returns:
        Prior precision `[L]` float64.

    Raises:
        ValueError: If the scope is unknown, the weights equal the prior mean (the evidence then increases in lambda
            without bound), or the curvature is zero or not finite.

    Warns:
        FitWarning: If a precision is at an end of the search range, or the evidence hardly depends on it.
    """
    check_distances(squared_distances)
    spectra = [s.double().flatten().cpu() for s in curvature]
    if not all(bool((s.isfinite() & (s >= 0)).all()) for s in spectra):
        raise ValueError(
            "the curvature has negative values, NaN or infinity, so the evidence has no maximum; collect it again from "
            "a model whose loss is finite"
        )
    distances = torch.stack([d.double().sum().cpu() for d in squared_distances])
    if scope == "layer":
        found = torch.stack([_stationary(s, distance) for s, distance in zip(spectra, distances, strict=True)])
        _warn_of_evidence(spectra, found, names)
        return found
    if scope == "global":
        single = _stationary(torch.cat(spectra), distances.sum())
        _warn_of_evidence([torch.cat(spectra)], single.view(1), ())
        return single.expand(len(spectra)).clone()
    raise ValueError(f"unknown scope {scope!r}; valid are global, layer")


def _warn_of_evidence(spectra: Sequence[Tensor], precision: Tensor, names: Sequence[str]) -> None:
    """Warn of precisions at an end of the range, and of those that the data do not determine."""
    if ended := _at_end(precision, LOG_PRECISION_RANGE, names):
        warn_of_fit(
            f"the prior precision from the evidence is at an end of its search range ({ended}): the curvature is "
            "nearly zero, or the weights nearly equal the prior mean; check training, the prior mean and the data",
            stacklevel=3,
        )
        return
    gammas = torch.stack([(s / (value + s)).sum() for s, value in zip(spectra, precision, strict=True)])
    if unidentified := _listed(gammas, gammas < _MIN_GAMMA, names):
        warn_of_fit(
            "the evidence hardly depends on the prior precision, since the data determine fewer than "
            f"{_MIN_GAMMA} directions of the weights (gamma {unidentified}); use more training data, or scope='global'",
            stacklevel=3,
        )


def _at_end(precision: Tensor, log_range: tuple[float, float], names: Sequence[str]) -> str:
    """The precisions at an end of a range of their logarithm; empty for none."""
    logs = precision.log()
    return _listed(precision, torch.stack([(logs - end).abs() < _AT_END for end in log_range]).any(0), names)


def _listed(values: Tensor, chosen: Tensor, names: Sequence[str]) -> str:
    """The chosen ones of the values of all layers, with the names or positions of these if there are several layers."""
    shown = names or [str(position) for position in range(len(values))]
    entries = [
        f"{value:.3g} in layer {shown[position]}" if len(values) > 1 else f"{value:.3g}"
        for position, value in enumerate(values.tolist())
        if chosen[position]
    ]
    return ", ".join(entries[:3]) + (f" and {len(entries) - 3} more" if len(entries) > 3 else "")


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
class LogNormalPrior:
    """An independent Gaussian over the log prior precision of every layer, for LPO on few labels.

    Attributes:
        centre: Precisions `[L]` at the mean of the logarithm, such as those of `fit_evidence`.
        width: Standard deviation of the log precision.

    Raises:
        ValueError: If a number is not positive and finite.
    """

    centre: Tensor
    width: float

    def __post_init__(self) -> None:
        if not 0 < self.width < math.inf:
            raise ValueError(f"the width of a prior on log precision must be positive and finite, got {self.width}")
        if not bool(((self.centre > 0) & (self.centre < math.inf)).all()):
            raise ValueError(
                f"the centre of a prior on log precision must be positive and finite, got {self.centre.tolist()}"
            )

    def penalty(self, log_precision: Tensor) -> Tensor:
        """Negative log density of the log precisions `[L]`, without its constant, in nats: a scalar."""
        return (log_precision - self.centre.to(log_precision).log()).square().sum() / (2 * self.width**2)


def fit_lpo(
    cache: CovarianceCache,
    scope: Scope = "layer",
    *,
    prior: LogNormalPrior | None = None,
    num_samples: int = LPO_SAMPLES,
    seed: int = 0,
    max_iterations: int = 60,
    names: Sequence[str] = (),
) -> Tensor:
    """Minimise the validation NLL of the MC predictive over the log prior precision.

    Laplace prior optimisation follows Yang et al. 2023 (https://arxiv.org/abs/2308.13111). Common random numbers make
    the objective smooth and deterministic, so a line search and L-BFGS replace 1000 Adam steps. The line search fits a
    single precision; `layer` starts L-BFGS from each of its minima and returns the best iterate.

    Args:
        cache: Cache of the validation set.
        scope: Scope of the prior precision: one per layer (`layer`), or a single one (`global`).
        prior: Prior on the log precisions, whose penalty is added to the *sum* of the NLL over the validation set: the
            more labels, the less it matters. None for none.
        num_samples: Number of Monte Carlo samples of the objective.
        seed: Seed for the Monte Carlo noise.
        max_iterations: Maximum number of L-BFGS iterations.
        names: Names of the layers, for warnings.

    Returns:
        Prior precision `[L]` float64.

    Raises:
        ValueError: If the scope is unknown, there are no labels, a label is no class of its example, or logits,
            covariance terms or the objective are not finite.

    Warns:
        FitWarning: If a prior precision is at an end of the search range, or the objective hardly depends on it.
    """
    if scope not in ("global", "layer"):
        raise ValueError(f"unknown scope {scope!r}; valid are global, layer")
    loss = _Objective(cache, num_samples, seed)

    def objective(log_precision: Tensor) -> Tensor:
        if prior is None:
            return loss(log_precision)
        return loss(log_precision) + prior.penalty(log_precision) / loss.num_examples

    num_layers = cache.num_layers
    singles = _starts(lambda x: float(objective(torch.full((num_layers,), x, dtype=torch.float64))))
    starts = [torch.full((num_layers,), x, dtype=torch.float64) for x in singles]
    log_precision = starts[0]
    if scope == "layer" and num_layers > 1:
        found = [_quasi_newton(objective, start, max_iterations) for start in starts]
        log_precision = min(found, key=lambda x: float(objective(x)))
    reached = float(loss(log_precision))
    if not math.isfinite(reached):
        raise ValueError("the validation NLL is not finite; check labels and logits of the calibration split")
    if prior is None:  # with one, the precisions are determined
        _warn_of_lpo(loss, log_precision, reached, names, by_layer=scope == "layer" and num_layers > 1)
    return log_precision.exp()


@torch.no_grad()
def validation_nll(
    cache: CovarianceCache, precision: Tensor, *, num_samples: int = LPO_SAMPLES, seed: int = 0
) -> float:
    """What `fit_lpo` minimises, without a prior: the mean validation NLL of the MC predictive.

    Args:
        cache: Cache of the validation set.
        precision: Prior precision `[L]`; infinite for no variance.
        num_samples: Number of Monte Carlo samples.
        seed: Seed for the Monte Carlo noise.

    Raises:
        ValueError: If there are no labels, a label is no class of its example, or covariance terms are not finite.
    """
    return float(_Objective(cache, num_samples, seed).at(precision))


def _warn_of_lpo(
    objective: _Objective, log_precision: Tensor, reached: float, names: Sequence[str], *, by_layer: bool
) -> None:
    """Warn of precisions at an end of the range, and of an objective that is flat around all or some of them."""
    low, high = ((log_precision - end).abs() < _AT_END for end in _LPO_RANGE)
    # A single precision is listed once, and not for each layer.
    listed = log_precision.exp() if by_layer else log_precision[:1].exp()
    if ended := _at_end(listed, _LPO_RANGE, names):
        effects = ((high, "adds no uncertainty"), (low, "makes predictions nearly uniform"))
        effect = " or ".join(text for at, text in effects if bool(at.any()))
        warn_of_fit(
            f"LPO ended at the limit of its search range (prior precision {ended}): no finite prior precision is "
            f"optimal on this validation set, so the posterior of these layers {effect}; add labels",
            stacklevel=3,
        )
    elif abs(rise := min(_changes(objective, log_precision, reached))) < _FLAT:
        warn_of_fit(
            f"LPO's prior precision is not determined by the {objective.num_examples} labels: one ten times as large "
            f"or as small changes their summed NLL by {abs(rise):.2g} nats; add labels",
            stacklevel=3,
        )
        return
    if not by_layer:
        return
    inner = (~(low | high)).tolist()
    flat = [
        inner[layer] and all(abs(change) < _FLAT for change in _changes(objective, log_precision, reached, layer))
        for layer in range(len(log_precision))
    ]
    if unidentified := _listed(log_precision.exp(), torch.tensor(flat), names):
        warn_of_fit(
            f"LPO's prior precision of some layers is not determined by the {objective.num_examples} labels "
            f"({unidentified}): one ten times as large or as small there changes their summed NLL by less than "
            f"{_FLAT} nats; add labels, or use scope='global'",
            stacklevel=3,
        )


@torch.no_grad()
def _changes(objective: _Objective, log_precision: Tensor, reached: float, layer: int | None = None) -> Iterator[float]:
    """How the summed NLL changes, in nats, where one layer's precision, or all, are a tenth or ten times as large."""
    for step in (-math.log(10), math.log(10)):
        moved = log_precision.clone()
        moved[slice(None) if layer is None else layer] += step
        yield objective.num_examples * (float(objective(moved)) - reached)


class _Objective:
    """Mean validation NLL of the MC predictive as a function of the log precisions `[L]`."""

    def __init__(self, cache: CovarianceCache, num_samples: int, seed: int) -> None:
        if not cache.is_finite:
            raise ValueError(
                "the covariance terms of the validation set are not finite: a gradient overflowed; check the weights "
                "and the scale of the logits"
            )
        self._cache = cache
        _, self._labels = cache.labelled()
        self.num_examples = len(self._labels)
        self._noise = cache.noise(num_samples, seed)

    def __call__(self, log_precision: Tensor) -> Tensor:
        return self.at(log_precision.exp())

    def at(self, precision: Tensor) -> Tensor:
        return self._cache.nll(precision, self._noise, self._labels)


def _starts(objective: Callable[[float], float]) -> list[float]:
    """Single log precisions from which to search over several, the minimum first.

    These are the minima of a coarse grid, refined by golden-section search. No gradient leads away from a flat end of
    the range, so if the minimum is there, the point where the flat part begins is a start, too.
    """
    low, high = _LPO_RANGE
    grid = torch.linspace(low, high, 25).tolist()
    last = len(grid) - 1
    with torch.no_grad():
        values = [value if math.isfinite(value) else math.inf for value in map(objective, grid)]
        best = min(range(len(grid)), key=values.__getitem__)
        inner = [i for i in range(1, last) if values[i] < min(values[i - 1], values[i + 1])]
        found = [_golden_section(objective, grid, values, i) for i in dict.fromkeys([best, *inner])]
    starts = [x for _, x in sorted(found)]
    level = values[best] + _PLATEAU
    steeper = [i for i, value in enumerate(values) if value > level]
    if steeper and min(max(values[: best + 1]), max(values[best:])) <= level:
        starts.append(grid[min(steeper, key=lambda i: abs(i - best))])
    return starts


def _golden_section(
    objective: Callable[[float], float], grid: Sequence[float], values: Sequence[float], centre: int
) -> tuple[float, float]:
    """The value and the place of the minimum between the neighbours of a point of the grid."""
    left, right = grid[max(centre - 1, 0)], grid[min(centre + 1, len(grid) - 1)]
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
    middle = (left + right) / 2
    return min((values[centre], grid[centre]), (objective(middle), middle))


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
