"""SWAG routers (https://arxiv.org/abs/2509.23830): a Gaussian fitted to router weights along a run of SGD."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from bmoe_lightning.routers.base import BayesianRouter, TrainedLogits
from bmoe_lightning.routers.distribution import LowRankLogits
from bmoe_lightning.routers.draws import Draws
from bmoe_lightning.routers.fine_tuned_weights import shifted
from bmoe_lightning.routers.types import Router
from bmoe_lightning.routers.weight_noise import SwagWeights


class SwagSamples(BayesianRouter):
    """Logits of weights drawn from SWAG's Gaussian; a sample is one weight for all tokens.

    Weights are given as their differences from the trained router's. All moments are zero before `fit`, and the router
    stays as it is.

    Args:
        router: The router.
        rank: Number R of deviations.
        dtype: Dtype of the moments.

    Raises:
        ValueError: If there are fewer than two deviations.
    """

    numbers_per_token = False
    not_negative = ("variance",)

    mean_shift: Tensor
    variance: Tensor
    deviations: Tensor

    def __init__(self, router: Router, rank: int = 20, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(router)
        if rank < 2:
            raise ValueError(f"SWAG needs the deviations of at least 2 collected weights, got a rank of {rank}")
        shape = router.num_experts, router.d_in
        self.register_buffer("mean_shift", torch.zeros(shape, dtype=dtype))
        self.register_buffer("variance", torch.zeros(shape, dtype=dtype))
        self.register_buffer("deviations", torch.zeros(rank, *shape, dtype=dtype))
        self._still = True
        self.register_load_state_dict_post_hook(_read_still)

    @property
    def is_still(self) -> bool:
        return self._still

    def fit(self, shifts: Tensor) -> None:
        """Fit the Gaussian.

        Args:
            shifts: Differences of the collected weights from the trained router's, in the order of the run,
                `[C, N, D]` with as many C as there are deviations, or more.

        Raises:
            ValueError: If there are fewer.
        """
        rank = len(self.deviations)
        if len(shifts) < rank:
            raise ValueError(
                f"SWAG with {rank} deviations needs the weights of {rank} steps or more, and there are {len(shifts)}; "
                "collect more, or lower the rank"
            )
        found = SwagWeights.of_collected(shifts.to(self.mean_shift), rank)
        self.mean_shift, self.variance = found.mean, found.variance
        self.deviations = found.deviations.clone()  # of all that were collected it is a part
        _read_still(self, None)

    def mean(self, u: Tensor, logits: Tensor) -> Tensor:
        return shifted(u, logits, self.mean_shift)

    def sampler(self, u: Tensor, logits: Tensor) -> Callable[[Draws], Tensor]:
        moments = self._moments()
        return lambda draws: shifted(u, logits, moments.sample(draws.shared(moments.noise_width)))

    def trained(self, u: Tensor, logits: Tensor, draws: Draws) -> TrainedLogits:
        raise NotImplementedError(
            "SWAG is fitted to weights that were collected in training, and is not trained itself; train "
            "FineTunedWeights, and fit() to its shifts"
        )

    def distribution(self, u: Tensor, logits: Tensor) -> LowRankLogits:
        found = self._moments().logits(u.to(self.mean_shift.dtype))
        return replace(found, mean=self.mean(u, logits))

    def _moments(self) -> SwagWeights:
        return SwagWeights(self.mean_shift, self.variance, self.deviations)


def _read_still(net: SwagSamples, _keys: object) -> None:
    net._still = not any(bool(moment.any()) for moment in (net.mean_shift, net.variance, net.deviations))
