"""What makes a curvature doubtful, whichever method uses it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bmoe_lightning.laplace.posterior import LaplacePosterior
from bmoe_lightning.utils.fit_warnings import warn_of_fit

MAX_DISCARDED = 0.5
"""Accepted share of a curvature's energy (the trace) that the low rank discards."""


@dataclass(frozen=True)
class DiscardedEnergy:
    """Shares of a curvature's energy (the trace) that its low rank discards.

    Attributes:
        rank: Eigenpairs stored of each Kronecker factor.
        total: Share over all layers.
        worst: Largest share of a layer.
        worst_layer: Name of that layer.
    """

    rank: int
    total: float
    worst: float
    worst_layer: str


def discarded_energy(posterior: LaplacePosterior) -> DiscardedEnergy:
    """The energy that the low rank of a curvature discards, in total and in the worst layer.

    Args:
        posterior: Posterior of any prior precision, with at least one layer.
    """
    layers = posterior.factors.layers
    full: list[float] = []
    kept = [float(curvature.sum()) for curvature in posterior.curvature]
    for layer in layers:
        # The trace of n_e A kron G, from the averages A and G over the slots.
        energy = layer.a_trace.double().cpu() * layer.g_trace.double().cpu() * layer.slots.double().cpu()
        full.append(float(energy.sum()))
    shares = torch.tensor([1 - k / f if f > 0 else 0.0 for k, f in zip(kept, full, strict=True)])
    total = 1 - sum(kept) / sum(full) if sum(full) > 0 else 0.0
    worst = int(shares.argmax())
    return DiscardedEnergy(
        rank=posterior.factors.rank,
        total=min(max(total, 0.0), 1.0),
        worst=float(shares[worst].clamp(0, 1)),
        worst_layer=layers[worst].name,
    )


def warn_of_discarded_energy(posterior: LaplacePosterior) -> None:
    """Warn if the low rank discards more than half of the curvature's energy, in total or in one layer.

    Args:
        posterior: Posterior of any prior precision; one of rank 0 discards nothing that was collected.

    Warns:
        FitWarning: With the total share and the worst layer.
    """
    if posterior.factors.rank == 0:
        return
    found = discarded_energy(posterior)
    if max(found.total, found.worst) > MAX_DISCARDED:
        warn_of_fit(
            f"rank {found.rank} discards {found.total:.0%} of the curvature's energy, in layer "
            f"{found.worst_layer} {found.worst:.0%}: variances along the discarded directions are those of "
            "the prior, hence too large; use a higher rank",
            stacklevel=2,
        )
