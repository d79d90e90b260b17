"""Variational temperature routers: experts are drawn, and a temperature of each token says how randomly.

After https://arxiv.org/abs/2509.23830 and https://arxiv.org/abs/2603.09453, whose training lets the temperature
collapse: it penalises `-log T`, which has no bound, and takes the top K of one-hot draws, where all experts but one are
ties. Here K distinct experts are drawn by one Gumbel draw, and the penalty is a divergence, which has its minimum at
the trained router's own probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from bmoe_lightning.routers.base import Alarm, BayesianRouter, TrainedLogits, drawn_matrix, hidden_width, zeros
from bmoe_lightning.routers.draws import Draws
from bmoe_lightning.routers.scores import MeanScores, at_least_float32
from bmoe_lightning.routers.selection import (
    gate_entropy,
    log_probability,
    restrict,
    sample_experts,
    tempered_divergence,
)
from bmoe_lightning.routers.types import Router

BOUNDS = (0.05, 20.0)
"""Smallest and largest temperature."""

_TEMPERATURE, _ENTROPY = "gate_temperature", "gate_entropy"

_ONE = math.log(math.e - 1)  # softplus of it is 1


class TemperatureChoice(BayesianRouter):
    """K experts drawn without replacement from `softmax(logits / T(u))`, `T = softplus(c2 relu(C1 u + b1) + b2)`.

    T is 1 at first, and clamped. No gradient passes through the choice; T gets one through the weights of the chosen
    experts, if these are tempered, and through the log-probability of the choice (see `RouterTraining`).

    Args:
        router: The router: the number K of experts is known, and the score is a softmax, once it is probed.
        returns_choice: How the choice gets into the model; see `choice_ways`.
        temper_weights: Whether the experts' weights are those of `softmax(logits / T)`, as in the papers, and not of
            `softmax(logits)`. Then a small T makes them one-hot; otherwise it gives the trained router.
        bounds: Smallest and largest temperature.
        hidden: Width H of the hidden layer; by default D / 4.
        seed: Seed of C1.
        dtype: Dtype of the trained part.

    Raises:
        ValueError: If the router was probed, and K is unknown or the score is no softmax.
    """

    draws_choice = True

    def __init__(
        self,
        router: Router,
        *,
        returns_choice: bool = False,
        temper_weights: bool = True,
        bounds: tuple[float, float] = BOUNDS,
        hidden: int | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(router)
        if router.score is not None:
            check_drawn(router)
        self.returns_choice = returns_choice
        self.temper_weights = temper_weights
        self._bounds = bounds
        width = hidden_width(router.d_in, hidden)
        self.hidden = drawn_matrix(width, router.d_in, seed=seed, router=router, dtype=dtype)
        self.hidden_bias = zeros(width, dtype=dtype)
        self.head = zeros(width, dtype=dtype)
        self.bias = torch.nn.Parameter(torch.tensor([_ONE], dtype=dtype, device="cpu"))  # FSDP2 shards no scalar

    def temperature(self, u: Tensor) -> Tensor:
        """The temperature of each token, `[tokens]`."""
        inner = (u.to(self.hidden.dtype) @ self.hidden.T + self.hidden_bias).relu()
        return F.softplus(inner @ self.head + self.bias).clamp(*self._bounds)

    def mean(self, u: Tensor, logits: Tensor) -> Tensor:
        return at_least_float32(logits)

    def gate_logits(self, u: Tensor, logits: Tensor) -> Tensor:
        return at_least_float32(logits) / self.temperature(u).unsqueeze(-1)

    def sampler(self, u: Tensor, logits: Tensor) -> Callable[[Draws], Tensor]:
        temperature = self.temperature(u)
        return lambda draws: self._chosen(logits, temperature, draws)[0]

    def averaged(self, u: Tensor, logits: Tensor, chunks: Iterable[Draws]) -> Tensor:
        temperature = self.temperature(u)
        weighted = self._weighted(logits, temperature)
        # In float64, where it exists: accelerators add in any order, and another rounding may be another choice.
        wide = weighted.dtype if weighted.device.type == "mps" else torch.float64
        total, count = torch.zeros_like(weighted, dtype=wide), 0
        for draws in chunks:
            chosen = self._drawn(logits, temperature, draws).movedim(0, 1)  # [tokens, S, K]
            count += chosen.shape[1]
            if self.returns_choice:  # an expert's weight is the same whichever others are chosen
                weights = weighted.new_ones(()).expand(chosen.shape)
            else:
                weights = weighted.unsqueeze(1).expand(-1, chosen.shape[1], -1).gather(-1, chosen).softmax(-1)
            total.scatter_add_(1, chosen.flatten(1), weights.flatten(1).to(wide))
        log_mean = (total / count).log().to(weighted.dtype)
        if self.returns_choice:
            return log_mean + weighted.log_softmax(-1)
        return MeanScores("softmax", log_mean).logits(self.mean(u, logits))

    def trained(self, u: Tensor, logits: Tensor, draws: Draws) -> TrainedLogits:
        temperature = self.temperature(u)
        (sampled,), (chosen,) = self._chosen(logits, temperature, draws)
        statistics = {
            _TEMPERATURE: temperature.detach(),
            _ENTROPY: gate_entropy(logits.detach(), temperature.detach()),
        }
        return TrainedLogits(
            sampled,
            self.penalty(logits, temperature),
            # Of what was drawn: logits that depend on other trained routers get their gradient as well.
            log_probability(logits, chosen, temperature),
            statistics,
        )

    def check_router(self) -> None:
        check_drawn(self.router)

    def collapse_alarm(self) -> Alarm:
        watch = CollapseWatch(self.router.num_experts, self._bounds)

        def observe(statistics: Mapping[str, float]) -> str | None:
            mean, entropy = statistics[_TEMPERATURE], statistics[_ENTROPY]
            if not watch.observe(mean, entropy):
                return None
            return (
                f"has had a mean temperature of {mean:.3g} (bounds {self._bounds[0]:g} and {self._bounds[1]:g}) and a "
                f"gate entropy of {entropy:.3g} nats (of at most {math.log(self.router.num_experts):.3g})"
            )

        return observe

    def penalty(self, logits: Tensor, temperature: Tensor) -> Tensor:
        """The divergence of the tempered from the trained router's probabilities, `[tokens]`: bounded, 0 at T = 1."""
        return tempered_divergence(logits, temperature)

    def distribution(self, u: Tensor, logits: Tensor) -> None:
        return None

    def _chosen(self, logits: Tensor, temperature: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Log-weights `[S, tokens, N]` of the chosen experts, `-inf` for others, and their indices `[S, tokens, K]`."""
        chosen = self._drawn(logits, temperature, draws)
        log_weights = self._weighted(logits, temperature).log_softmax(-1).expand(*chosen.shape[:-1], -1)
        return restrict(log_weights, chosen), chosen

    def _drawn(self, logits: Tensor, temperature: Tensor, draws: Draws) -> Tensor:
        """The experts that are drawn, `[S, tokens, K]`."""
        assert self.router.top_k is not None
        gumbel = draws.of_tokens(self.router.num_experts, "gumbel")
        return sample_experts(logits.detach(), gumbel, self.router.top_k, temperature.detach())

    def _weighted(self, logits: Tensor, temperature: Tensor) -> Tensor:
        """The logits by which the drawn experts are weighted, `[tokens, N]`."""
        weighted = at_least_float32(logits)
        return weighted / temperature.unsqueeze(-1) if self.temper_weights else weighted


def check_drawn(router: Router) -> None:
    """Check that the experts of a router can be drawn.

    Raises:
        ValueError: If their number for a token is unknown or the score is no softmax.
    """
    if router.top_k is None:
        raise ValueError(
            f"the number of experts that the router {router.name!r} chooses for a token is unknown, so they cannot be "
            "drawn; use a model without a limit on the tokens of an expert"
        )
    if router.score != "softmax":
        raise ValueError(
            f"experts are drawn from a softmax of router logits, and the router {router.name!r} has the score "
            f"{router.score!r}; use another method for this model"
        )


@dataclass
class CollapseWatch:
    """Notices temperatures that have collapsed: T at a bound, or a gate that is one-hot or uniform.

    Attributes:
        num_experts: Number of experts N.
        bounds: Smallest and largest temperature.
        patience: Number of steps in a row after which it is said.
        steps: Number of such steps so far.
    """

    num_experts: int
    bounds: tuple[float, float] = BOUNDS
    patience: int = 100
    steps: int = 0

    def observe(self, temperature: float, entropy: float) -> bool:
        """Whether the temperature has collapsed by now.

        Args:
            temperature: Mean temperature of a step.
            entropy: Mean entropy of the gate in nats.
        """
        lowest, highest = self.bounds
        share = entropy / math.log(self.num_experts)
        collapsed = not 1.01 * lowest < temperature < 0.99 * highest or not 0.01 < share < 0.99
        self.steps = self.steps + 1 if collapsed else 0
        return self.steps >= self.patience
