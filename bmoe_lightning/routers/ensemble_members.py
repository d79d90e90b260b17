"""Deep-ensemble routers (https://arxiv.org/abs/2509.23830): router weights of several training runs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bmoe_lightning.routers.base import BayesianRouter, TrainedLogits
from bmoe_lightning.routers.distribution import LowRankLogits
from bmoe_lightning.routers.draws import Draws
from bmoe_lightning.routers.fine_tuned_weights import shifted
from bmoe_lightning.routers.types import Router
from bmoe_lightning.routers.weight_noise import ensemble_logits


class EnsembleMembers(BayesianRouter):
    """Logits of the weights of M members: sample s is member `s mod M`, for all tokens, and nothing is drawn.

    Weights are given as their differences from the trained router's. They are zero before `fit`, and the router stays
    as it is.

    Args:
        router: The router.
        num_members: Number M of members.
        dtype: Dtype of the weights.

    Raises:
        ValueError: If there is no member.
    """

    numbers_per_token = False

    shifts: Tensor

    def __init__(self, router: Router, num_members: int = 5, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(router)
        if num_members < 1:
            raise ValueError(f"an ensemble of routers needs at least one member, got {num_members}")
        shape = num_members, router.num_experts, router.d_in
        self.register_buffer("shifts", torch.zeros(shape, dtype=dtype))
        self._still = True
        self.register_load_state_dict_post_hook(_read_still)

    @property
    def is_still(self) -> bool:
        return self._still

    def fit(self, shifts: Tensor) -> None:
        """Set the weights of the members.

        Args:
            shifts: Differences of their weights from the trained router's, `[M, N, D]`.

        Raises:
            ValueError: If they are of another number of members or another router.
        """
        if shifts.shape != self.shifts.shape:
            raise ValueError(
                f"weights of shape {tuple(shifts.shape)} were given for the {len(self.shifts)} members of a router of "
                f"{self.router.num_experts} experts and {self.router.d_in} inputs; pass one weight for each member"
            )
        self.shifts = shifts.detach().to(self.shifts, copy=True)
        _read_still(self, None)

    def mean(self, u: Tensor, logits: Tensor) -> Tensor:
        return shifted(u, logits, self.shifts.mean(0))

    def sampler(self, u: Tensor, logits: Tensor) -> Callable[[Draws], Tensor]:
        count = len(self.shifts)
        return lambda draws: shifted(u, logits, self.shifts[[sample % count for sample in draws.samples]])

    def trained(self, u: Tensor, logits: Tensor, draws: Draws) -> TrainedLogits:
        raise NotImplementedError(
            "the members of an ensemble are trained one by one, and not together; train FineTunedWeights for each, and "
            "fit() to their shifts"
        )

    def distribution(self, u: Tensor, logits: Tensor) -> LowRankLogits:
        return ensemble_logits(shifted(u, logits, self.shifts))


def _read_still(net: EnsembleMembers, _keys: object) -> None:
    net._still = not bool(net.shifts.any())
