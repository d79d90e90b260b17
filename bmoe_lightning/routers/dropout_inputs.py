"""MC-dropout routers (https://arxiv.org/abs/2509.23830): dropout on the router's input, also in predictions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bmoe_lightning.routers.base import BayesianRouter, TrainedLogits, zeros
from bmoe_lightning.routers.draws import Draws
from bmoe_lightning.routers.fine_tuned_weights import shifted
from bmoe_lightning.routers.scores import at_least_float32
from bmoe_lightning.routers.types import Router
from bmoe_lightning.routers.weight_noise import DropoutLogits, check_rate, dropout_multipliers


class DropoutInputs(BayesianRouter):
    """Logits `W (m u)` with a mask m of its own for each token, which is zero with the probability of the rate.

    The mean of the logits is that of the router without dropout: averaged logits would be no other router.

    Args:
        router: The router.
        weight: Its weight W, `[N, D]`; see `router_weight`.
        rate: Probability p of dropout, 0 <= p < 1.
        trains_weight: Whether a shift of the weight is trained, zero at first. Otherwise nothing is, and with a rate of
            0 the router stays as it is.
        dtype: Dtype of the weight and the shift.

    Raises:
        ValueError: If the rate is not a probability below one, or the weight is that of another router.
    """

    not_negative = ("rate",)

    weight: Tensor
    rate: Tensor

    def __init__(
        self,
        router: Router,
        weight: Tensor,
        rate: float,
        *,
        trains_weight: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(router)
        check_rate(rate)
        if weight.shape != (router.num_experts, router.d_in):
            raise ValueError(
                f"the weight of the router {router.name!r} is {router.num_experts} x {router.d_in}, and one of shape "
                f"{tuple(weight.shape)} was given; pass its own"
            )
        self.register_buffer("weight", weight.detach().to(dtype, copy=True))
        self.register_buffer("rate", torch.tensor(rate, dtype=torch.float64))
        self._rate = rate
        self.register_load_state_dict_post_hook(_read_rate)
        self.shift = zeros(router.num_experts, router.d_in, dtype=dtype) if trains_weight else None

    @property
    def is_still(self) -> bool:
        return self._rate == 0 and self.shift is None

    @property
    def floats_per_token(self) -> int:
        return self.router.d_in

    def mean(self, u: Tensor, logits: Tensor) -> Tensor:
        return at_least_float32(logits) if self.shift is None else shifted(u, logits, self.shift)

    def sampler(self, u: Tensor, logits: Tensor) -> Callable[[Draws], Tensor]:
        mean, inputs, weight = self.mean(u, logits), u.to(self.weight.dtype), self._trained_weight()

        def sample(draws: Draws) -> Tensor:
            uniform = draws.of_tokens(self.router.d_in, "uniform").to(inputs.dtype)
            # As a difference from the mean, which has the bias and is the model's own with no dropout.
            return mean + ((dropout_multipliers(uniform, self._rate) - 1) * inputs) @ weight.T

        return sample

    def trained(self, u: Tensor, logits: Tensor, draws: Draws) -> TrainedLogits:
        (sampled,) = self.samples(u, logits, draws)
        return TrainedLogits(sampled, sampled.new_zeros(len(sampled)))

    def distribution(self, u: Tensor, logits: Tensor) -> DropoutLogits:
        return DropoutLogits(self.mean(u, logits), u.to(self.weight.dtype), self._trained_weight(), self._rate)

    def hyperparameters(self) -> dict[str, float]:
        return {"rate": self._rate}

    def _trained_weight(self) -> Tensor:
        return self.weight if self.shift is None else self.weight + self.shift


def _read_rate(net: DropoutInputs, _keys: object) -> None:
    # Read once, and not in each call, which would wait for an accelerator.
    net._rate = float(net.rate)
    check_rate(net._rate)
