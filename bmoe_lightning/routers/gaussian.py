"""Bayesian routers with a Gaussian over the logits of each token, around those of the trained router."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from bmoe_lightning.routers.base import Alarm, BayesianRouter, TrainedLogits, zeros
from bmoe_lightning.routers.distribution import GaussianLogits
from bmoe_lightning.routers.draws import Draws
from bmoe_lightning.routers.scores import at_least_float32
from bmoe_lightning.routers.types import Router

_RATIO = "scale_ratio"
_COLLAPSED, _PATIENCE = 0.05, 100  # of the prior scale; steps in a row


class GaussianRouter(BayesianRouter):
    """A Gaussian `N(logits + A u, Sigma(u))` over the logits, with the prior `N(logits, prior_scale^2 I)`.

    A is zero at first, so that the mean is the trained router.

    Args:
        router: The router.
        prior_scale: Standard deviation of each logit under the prior. With 0 the router stays as it is.
        dtype: Dtype of the trained part.

    Raises:
        ValueError: If the scale is negative or not finite.
    """

    not_negative = ("prior_scale",)

    prior_scale: Tensor

    def __init__(self, router: Router, prior_scale: float, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(router)
        if not 0 <= prior_scale < float("inf"):
            raise ValueError(f"the prior scale of router logits must be a number >= 0, got {prior_scale}")
        self.register_buffer("prior_scale", torch.tensor(prior_scale, dtype=dtype, device="cpu"))
        self._still = prior_scale == 0
        self.register_load_state_dict_post_hook(_read_scale)
        self.shift = zeros(router.num_experts, router.d_in, dtype=dtype)

    @property
    def is_still(self) -> bool:
        return self._still

    def rescale(self, prior_scale: float) -> None:
        """Change the scale of the prior, and that of the distribution with it."""
        self.prior_scale.fill_(prior_scale)
        self._still = prior_scale == 0

    def collapse_alarm(self) -> Alarm:
        steps = 0

        def observe(statistics: Mapping[str, float]) -> str | None:
            nonlocal steps
            ratio = statistics[_RATIO]
            steps = steps + 1 if ratio < _COLLAPSED else 0
            return f"has had noise of {ratio:.2g} of its prior scale" if steps >= _PATIENCE else None

        return observe

    @abstractmethod
    def distribution(self, u: Tensor, logits: Tensor) -> GaussianLogits:
        """The Gaussian over the logits of each token."""

    def mean(self, u: Tensor, logits: Tensor) -> Tensor:
        return at_least_float32(logits) + u.to(self.shift.dtype) @ self.shift.T

    def sampler(self, u: Tensor, logits: Tensor) -> Callable[[Draws], Tensor]:
        found = self.distribution(u, logits)
        return lambda draws: found.sample(draws.of_tokens(found.noise_width))

    def trained(self, u: Tensor, logits: Tensor, draws: Draws) -> TrainedLogits:
        found = self.distribution(u, logits)
        (sampled,) = found.sample(draws.of_tokens(found.noise_width))
        divergence = found.kl(at_least_float32(logits), self.prior_scale)
        spread = (found.trace().detach() / found.mean.shape[-1]).sqrt() / self.prior_scale
        return TrainedLogits(sampled, divergence, statistics={"kl": divergence.detach(), _RATIO: spread})

    def hyperparameters(self) -> dict[str, float]:
        return {"prior_scale": float(self.prior_scale)}


def _read_scale(net: GaussianRouter, _keys: object) -> None:
    # Read once, and not in each call, which would wait for an accelerator.
    net._still = not bool(net.prior_scale)
