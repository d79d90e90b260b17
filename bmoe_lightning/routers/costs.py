"""Multiply-adds that random routers add to a forward pass, in closed form: per token and router.

The forms are those of https://arxiv.org/abs/2509.23830 and https://arxiv.org/abs/2603.09453, with S samples averaged in
the router (for predictions averaged over S passes, a token costs S forward passes instead). A scale times a noise is
one multiply-add, and a triangular product half of a square one; profilers count neither. Generating random numbers,
softmax and top K are not counted, as for the model itself.

Symbols: D width of the router's input, N experts, H width of a hidden layer (D / 4 in both papers), S samples, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RouterCost:
    """Multiply-adds of one token in one router, beyond those of the trained router.

    Attributes:
        linear: In linear layers.
        sampling: In drawing samples of the logits from their distribution.
    """

    linear: int
    sampling: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.linear + self.sampling

    def share(self, num_routers: int, active_macs: float) -> float:
        """The share that a number of such routers adds to the multiply-adds of a token in the model.

        Args:
            num_routers: Number of routers of this form.
            active_macs: Multiply-adds of a token in the model, without attention scores: its active parameters that are
                multiplied by something.
        """
        return num_routers * self.total / active_macs


@dataclass(frozen=True)
class RoutingCost:
    """What a prediction with random routers takes.

    Attributes:
        passes: Number of forward passes through the model.
        per_token: Multiply-adds of one token in one router in each of them.
        parameters: Numbers that are stored for one router.
    """

    passes: int
    per_token: RouterCost
    parameters: int = 0


def dropout_cost(d_in: int, num_experts: int, num_samples: int) -> RouterCost:
    """MC dropout: S linear maps of the router's input times a mask, beside the map of the trained router."""
    return RouterCost(num_samples * d_in * num_experts, num_samples * d_in)


def weights_cost(d_in: int, num_experts: int, num_samples: int) -> RouterCost:
    """SWAG or an ensemble: S linear maps, of weights that are drawn once for all tokens."""
    return RouterCost(num_samples * d_in * num_experts, 0)


def noise_cost(num_experts: int, num_samples: int) -> RouterCost:
    """Independent noise of a fixed scale."""
    return RouterCost(0, num_samples * num_experts)


def diagonal_cost(d_in: int, num_experts: int, num_samples: int, hidden: int | None = None) -> RouterCost:
    """Mean-field router: a shift of the mean D -> N, and scales D -> H -> N."""
    hidden = _hidden(d_in, hidden)
    return RouterCost(_heads(d_in, num_experts, hidden, num_experts), num_samples * num_experts)


def triangular_cost(d_in: int, num_experts: int, num_samples: int, hidden: int | None = None) -> RouterCost:
    """Full-covariance router: a shift of the mean D -> N, and a triangle D -> H -> N (N + 1) / 2."""
    hidden, triangle = _hidden(d_in, hidden), num_experts * (num_experts + 1) // 2
    return RouterCost(_heads(d_in, num_experts, hidden, triangle), num_samples * triangle)


def low_rank_cost(d_in: int, num_experts: int, num_samples: int, rank: int, hidden: int | None = None) -> RouterCost:
    """Low-rank router: a shift of the mean D -> N, and diagonal and factor D -> H -> N (1 + R)."""
    hidden, width = _hidden(d_in, hidden), num_experts * (1 + rank)
    return RouterCost(_heads(d_in, num_experts, hidden, width), num_samples * width)


def temperature_cost(d_in: int, num_experts: int, hidden: int | None = None) -> RouterCost:
    """Variational temperature: D -> H -> 1, and one division of the logits."""
    hidden = _hidden(d_in, hidden)
    return RouterCost(d_in * hidden + hidden, num_experts)


def _hidden(d_in: int, hidden: int | None) -> int:
    return d_in // 4 if hidden is None else hidden


def _heads(d_in: int, num_experts: int, hidden: int, width: int) -> int:
    return d_in * num_experts + d_in * hidden + hidden * width
