"""The gap between the last chosen expert's logit and the next one's: the size of noise that changes routes.

Gaps are counted in narrow bins of their logarithm, which takes little memory however many tokens there are, and counts
of batches and ranks add up. The median is interpolated within its bin.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bmoe_lightning.routers.scores import at_least_float32
from bmoe_lightning.routers.types import Router

_BINS_PER_OCTAVE = 64
_LOWEST, _HIGHEST = -24, 24  # log2
NUM_BINS = (_HIGHEST - _LOWEST) * _BINS_PER_OCTAVE + 1
"""Number of bins; the first one is of gaps that are zero up to rounding."""


def count_gaps(logits: Tensor, router: Router) -> Tensor:
    """Count the gaps between the K-th and the next largest logit of tokens; where K = N, those one rank above.

    Args:
        logits: Logits `[tokens, N]`.
        router: The router, probed.

    Returns:
        `[NUM_BINS]` int64.

    Raises:
        ValueError: If K is unknown.
    """
    chosen = min(_known_top_k(router), router.num_experts - 1)
    largest = at_least_float32(logits).topk(chosen + 1, dim=-1).values
    gaps = (largest[:, chosen - 1] - largest[:, chosen]).nan_to_num(0.0)
    bins = ((gaps.log2() - _LOWEST) * _BINS_PER_OCTAVE).floor() + 1
    return bins.clamp(0, NUM_BINS - 1).long().cpu().bincount(minlength=NUM_BINS)


def check_gaps(routers: Sequence[Router]) -> None:
    """Check that gaps of routers can be counted.

    Args:
        routers: The routers, probed.

    Raises:
        ValueError: If K of one is unknown.
    """
    for router in routers:
        _known_top_k(router)


def _known_top_k(router: Router) -> int:
    if router.top_k is None:
        raise ValueError(
            f"the number of experts that the router {router.name!r} chooses for a token is unknown, since experts drop "
            "tokens; use a model without a limit on the tokens of an expert"
        )
    return router.top_k


def median_gap(counts: Tensor) -> float:
    """The median of counted gaps; 0 if half of them or more are.

    Args:
        counts: `[NUM_BINS]`, see `count_gaps`.

    Raises:
        ValueError: If nothing was counted.
    """
    below = counts.double().cumsum(0)
    total = float(below[-1])
    if total == 0:
        raise ValueError("the gaps between router logits cannot be measured without tokens; pass held-out inputs")
    found = int(torch.searchsorted(below, total / 2))
    if found == 0:
        return 0.0
    share = (total / 2 - float(below[found - 1])) / float(counts[found])
    return float(2 ** (_LOWEST + (found - 1 + share) / _BINS_PER_OCTAVE))
