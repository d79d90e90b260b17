"""Logits of routers with random weights (dropout, SWAG, ensembles), whose covariance given the input is closed form.

Shapes: router weight `W [N, D]`, router input `u [tokens, D]`, logits `W u [tokens, N]`. A bias that is random too is a
column of W, and a column of ones in u; one that is fixed is in the mean alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bmoe_lightning.routers.distribution import LogitDistribution, LowRankLogits


def dropout_multipliers(uniform: Tensor, rate: float) -> Tensor:
    """What dropout multiplies a router's input by: 0 with the probability of the rate, else `1 / (1 - rate)`.

    Args:
        uniform: Uniform numbers in (0, 1), `[..., D]`.
        rate: Probability p, 0 <= p < 1.

    Raises:
        ValueError: If the rate is not a probability below one.
    """
    check_rate(rate)
    return (uniform >= rate).to(uniform.dtype) / (1 - rate)


@dataclass(frozen=True)
class DropoutLogits(LogitDistribution):
    """Logits under dropout on the router's input, `Sigma = p / (1 - p) W diag(u^2) W^T`.

    Dropout is unbiased and the router linear, so that the mean of the logits is that of the trained router: average
    scores or predictions, since averaged logits route as if there were no dropout.

    Attributes:
        mean: Logits of the trained router, `[tokens, N]`.
        inputs: Inputs u of the router, `[tokens, D]`.
        weight: Weight W, `[N, D]`.
        rate: Probability p of dropout, 0 <= p < 1.

    Raises:
        ValueError: If the rate is not a probability below one.
    """

    inputs: Tensor
    weight: Tensor
    rate: float

    def __post_init__(self) -> None:
        check_rate(self.rate)

    def trace(self) -> Tensor:
        return self._of_columns(self.weight)

    def centred_trace(self) -> Tensor:
        return self._of_columns(self.weight - self.weight.mean(0))

    def covariance(self) -> Tensor:
        scaled = self.inputs.unsqueeze(1) * self.weight
        return self._odds * (scaled @ scaled.mT)

    def _of_columns(self, weight: Tensor) -> Tensor:
        return self._odds * (self.inputs.square() @ weight.square().sum(0))

    @property
    def _odds(self) -> float:
        return self.rate / (1 - self.rate)


@dataclass(frozen=True)
class SwagWeights:
    """SWAG over a router's weight (Maddox et al. 2019, https://arxiv.org/abs/1902.02476).

    Attributes:
        mean: Mean m of the collected weights, `[N, D]`.
        variance: Their variances v, not negative, `[N, D]`.
        deviations: The last deviations from the running mean, `[R, N, D]`.

    Raises:
        ValueError: If there are fewer than two deviations.
    """

    mean: Tensor
    variance: Tensor
    deviations: Tensor

    def __post_init__(self) -> None:
        if len(self.deviations) < 2:
            raise ValueError(
                f"SWAG divides by the number of deviations less one, and there is {len(self.deviations)}; collect "
                "weights at least twice"
            )

    @classmethod
    def of_collected(cls, collected: Tensor, rank: int = 20) -> SwagWeights:
        """The moments of weights that were collected along a run of SGD.

        Args:
            collected: Weights in the order of the run, `[C, N, D]`.
            rank: Maximum number R of deviations.

        Raises:
            ValueError: If there are fewer than two collections, or the rank is less than two.
        """
        counts = torch.arange(1, len(collected) + 1).to(collected)
        running = collected.cumsum(0) / counts.view(-1, 1, 1)
        # Around the mean: E[W^2] - m^2 cancels, since the weights differ little.
        variance = (collected - collected.mean(0)).square().mean(0)
        return cls(collected.mean(0), variance, (collected - running)[-rank:] if rank > 0 else collected[:0])

    @property
    def noise_width(self) -> int:
        """Number of standard normal numbers that one sample takes."""
        return self.mean.numel() + len(self.deviations)

    def sample(self, noise: Tensor) -> Tensor:
        """Samples of the weight, each for all tokens of a pass.

        Args:
            noise: Standard normal numbers, `[S, noise_width]`.

        Returns:
            `[S, N, D]` in the mean's dtype.
        """
        independent, common = noise.to(self.mean).split([self.mean.numel(), len(self.deviations)], -1)
        independent = (self.variance / 2).sqrt() * independent.view(-1, *self.mean.shape)
        return self.mean + independent + torch.tensordot(common, self.deviations, 1) / self._divisor

    def logits(self, inputs: Tensor) -> LowRankLogits:
        """The distribution of the logits of each token: `diag(v u^2) / 2 + B B^T / (2 (R - 1))`, `B = [Dv_r u]_r`.

        Args:
            inputs: Inputs u of the router, `[tokens, D]`.
        """
        factor = torch.einsum("rnd,td->tnr", self.deviations, inputs) / self._divisor
        return LowRankLogits(inputs @ self.mean.T, inputs.square() @ self.variance.T / 2, factor)

    @property
    def _divisor(self) -> float:
        return math.sqrt(2 * (len(self.deviations) - 1))


def ensemble_logits(members: Tensor) -> LowRankLogits:
    """The mean and the covariance of the logits over the members of an ensemble.

    Args:
        members: Logits of each member, `[M, tokens, N]`.

    Returns:
        The covariance is the sample covariance, with M - 1 in its denominator; that of one member is zero.
    """
    mean = members.mean(0)
    factor = (members - mean).permute(1, 2, 0) / math.sqrt(max(len(members) - 1, 1))
    return LowRankLogits(mean, torch.zeros_like(mean), factor)


def check_rate(rate: float) -> None:
    """Refuse a rate of dropout that is no probability below one.

    Raises:
        ValueError: If it is not.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"the rate of dropout is a probability below 1, got {rate}")
