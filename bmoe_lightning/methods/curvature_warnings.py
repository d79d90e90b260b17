"""What makes a curvature doubtful, whichever method uses it."""

from __future__ import annotations

import torch

from bmoe_lightning.laplace.posterior import LaplacePosterior
from bmoe_lightning.utils.fit_warnings import warn_of_fit

MAX_DISCARDED = 0.5
"""Accepted share of a curvature's energy (the trace) that the low rank discards."""


def warn_of_discarded_energy(posterior: LaplacePosterior) -> None:
    """Warn if the low rank discards more than half of the curvature's energy, in total or in one layer.

    Args:
        posterior: Posterior of any prior precision; one of rank 0 discards nothing that was collected.

    Warns:
        FitWarning: With the total share and the worst layer.
    """
    layers = posterior.factors.layers
    if posterior.factors.rank == 0:
        return
    full: list[float] = []
    kept = [float(curvature.sum()) for curvature in posterior.curvature]
    for layer in layers:
        # The trace of n_e A kron G, from the averages A and G over the slots.
        energy = layer.a_trace.double().cpu() * layer.g_trace.double().cpu() * layer.slots.double().cpu()
        full.append(float(energy.sum()))
    shares = torch.tensor([1 - k / f if f > 0 else 0.0 for k, f in zip(kept, full, strict=True)])
    total = 1 - sum(kept) / sum(full) if sum(full) > 0 else 0.0
    worst = int(shares.argmax())
    if max(total, float(shares[worst])) > MAX_DISCARDED:
        warn_of_fit(
            f"rank {posterior.factors.rank} discards {total:.0%} of the curvature's energy, in layer "
            f"{layers[worst].name} {float(shares[worst]):.0%}: variances along the discarded directions are those of "
            "the prior, hence too large; use a higher rank",
            stacklevel=2,
        )
