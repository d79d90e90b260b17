"""Routes that are sampled by Gaussian noise on the logits of every router, as methods use them.

Shapes: `S` routes, `B` examples of a batch, `N` of the held-out data, `K` classes, `L` routers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bmoe_lightning.methods.base import State
from bmoe_lightning.methods.batch_view import BatchView
from bmoe_lightning.methods.routes import located_routers, sampled_log_probs
from bmoe_lightning.methods.workbench import Workbench
from bmoe_lightning.routers.fixed_noise import FixedNoise
from bmoe_lightning.routers.types import Router


@dataclass(frozen=True)
class NoiseRoutes:
    """Routes along which the logits of every router have Gaussian noise.

    Attributes:
        num_samples: Number of routes S.
        antithetic: Whether routes come in pairs of opposite noise.
        per_pass: Number of routes that one forward pass computes.

    Raises:
        ValueError: If one of the numbers is below 1.
    """

    num_samples: int
    antithetic: bool
    per_pass: int

    def __post_init__(self) -> None:
        if self.num_samples < 1 or self.per_pass < 1:
            raise ValueError(
                f"router noise needs at least one sample, got {self.num_samples} samples and {self.per_pass} per pass"
            )

    def log_probs(self, batch: BatchView, sigma: Tensor, routers: Sequence[Router] | None = None) -> Tensor:
        """Log-probabilities along each route, `[S, B, K]`; what methods share of a batch is computed once.

        Args:
            batch: View of the batch.
            sigma: Standard deviation of the noise of each router, `[L]` float64.
            routers: The routers; None locates them.

        Raises:
            ValueError: If the model has another number of routers.
        """
        if not sigma.any():
            return batch.logits.log_softmax(-1).expand(self.num_samples, -1, -1)
        scales = tuple(sigma.tolist())
        return batch.once((self, scales), lambda: self._sampled(batch, scales, routers))

    def held_out(self, work: Workbench, scales: Sequence[float], unit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities of the held-out data without noise, and along routes with noise of several scales.

        Methods with the same routes share one pass over the data, and its random numbers.

        Args:
            work: Workbench of the fit.
            scales: Scales of the noise, positive.
            unit: What each router's noise is scaled by, `[L]` float64; zero for routers without noise.

        Returns:
            Log-probabilities `[N, K]` without noise and `[scales, S, N, K]` along routes, and labels `[N]`.
        """
        routers = work.routers()

        def candidates(view: BatchView) -> Tensor:
            routes = [self.log_probs(view, scale * unit, routers) for scale in scales]
            return torch.cat([view.logits.log_softmax(-1).unsqueeze(0), *routes])

        found, labels = work.held_out_log_probs(candidates, key=(self, tuple(scales), tuple(unit.tolist())))
        return found[0], found[1:].unflatten(0, (len(scales), self.num_samples)), labels

    def _sampled(self, batch: BatchView, scales: tuple[float, ...], routers: Sequence[Router] | None) -> Tensor:
        if routers is None:
            routers = located_routers(batch, len(scales))
        nets = noise_nets(routers, scales)
        return sampled_log_probs(batch, nets, self.num_samples, antithetic=self.antithetic, per_pass=self.per_pass)


def noise_nets(routers: Sequence[Router], sigma: Sequence[float]) -> list[FixedNoise]:
    """Noise of a standard deviation for each router."""
    return [FixedNoise(router, scale) for router, scale in zip(routers, sigma, strict=True)]


def check_scales(scales: Sequence[float]) -> None:
    """Check the candidates for the scale of noise.

    Raises:
        ValueError: If there are none, or one is not positive and finite.
    """
    if not scales or not all(0 < scale < math.inf for scale in scales):
        raise ValueError(f"scales must be positive numbers, at least one, got {tuple(scales)}")


def check_noise_state(state: State) -> None:
    """Check the entries of a state that has noise: `scale`, and `unit` and `sigma` `[L]`.

    Raises:
        ValueError: If one is missing, or no fit has such a value.
    """
    for key, dimensions in (("scale", 0), ("unit", 1), ("sigma", 1)):
        value = state.get(key)
        if value is None or value.dtype != torch.float64 or value.dim() != dimensions or bool((value < 0).any()):
            raise ValueError(f"{key!r} must be float64, of {dimensions} dimensions and not negative")
    if not torch.equal(state["sigma"], state["scale"] * state["unit"]):
        raise ValueError("'sigma' must be 'scale' times 'unit', of each router")


def warn_of_scale(work: Workbench, scale: float, largest: float, routers: Sequence[Router]) -> None:
    """Warn where the fitted scale is the largest candidate, and of routers that get no noise.

    Args:
        work: Workbench of the fit.
        scale: The fitted scale.
        largest: The largest candidate.
        routers: The routers that should get noise.
    """
    if scale == largest:
        work.warn(f"the scale of the routers' noise is the largest candidate ({scale:g}); add larger ones to scales")
    gaps = work.router_gaps()
    warn_of_still(work, [router for router in routers if not gaps[router.index]], len(routers))


def warn_of_still(work: Workbench, still: Sequence[Router], count: int) -> None:
    """Warn of routers that get no noise, if there are any.

    Args:
        work: Workbench of the fit.
        still: These routers.
        count: Number of all routers that should get noise.
    """
    if still:
        work.warn(
            f"{len(still)} of {count} routers get no noise, {still[0].name!r} for one: at half of the tokens, their "
            "K-th and next largest logits are equal"
        )
