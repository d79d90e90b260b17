"""Mean-field variational routers (https://arxiv.org/abs/2509.23830, https://arxiv.org/abs/2603.09453)."""

from __future__ import annotations

import torch
from torch import Tensor

from bmoe_lightning.routers.base import drawn_matrix, hidden_width, zeros
from bmoe_lightning.routers.distribution import DiagonalLogits
from bmoe_lightning.routers.gaussian import GaussianRouter
from bmoe_lightning.routers.types import Router


class MeanFieldLogits(GaussianRouter):
    """Independent logits, `log sigma^2 = C2 relu(C1 u) + log prior_scale^2`.

    C2 is zero at first, so that the distribution is the prior.

    Args:
        router: The router.
        prior_scale: Standard deviation of each logit under the prior.
        hidden: Width H of the hidden layer; by default D / 4.
        seed: Seed of C1.
        dtype: Dtype of the trained part.
    """

    def __init__(
        self,
        router: Router,
        prior_scale: float,
        *,
        hidden: int | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(router, prior_scale, dtype=dtype)
        width = hidden_width(router.d_in, hidden)
        self.hidden = drawn_matrix(width, router.d_in, seed=seed, router=router, dtype=dtype)
        self.log_variance = zeros(router.num_experts, width, dtype=dtype)

    def distribution(self, u: Tensor, logits: Tensor) -> DiagonalLogits:
        inner = (u.to(self.hidden.dtype) @ self.hidden.T).relu()
        scale = self.prior_scale * (0.5 * inner @ self.log_variance.T).exp()
        return DiagonalLogits(self.mean(u, logits), scale)
