"""The median gap between router logits, from counts of batches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bmoe_lightning.routers.gaps import NUM_BINS, count_gaps, median_gap
from bmoe_lightning.routers.types import Router

ROUTER = Router("router", 0, 5, 2, "experts", top_k=2, score="softmax")


@pytest.mark.parametrize("scale", [1e-4, 1.0, 50.0])
def test_median_of_batches(scale):
    logits = scale * torch.randn(4001, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ordered = logits.sort(-1, descending=True).values
    for top_k, (above, below) in {1: (0, 1), 2: (1, 2), 5: (3, 4)}.items():
        router = replace(ROUTER, top_k=top_k)
        counts = torch.stack([count_gaps(part, router) for part in logits.split(1000)]).sum(0)
        assert counts.sum() == 4001
        exact = float((ordered[:, above] - ordered[:, below]).median())
        assert median_gap(counts) == pytest.approx(exact, rel=0.005)


def test_equal_logits_have_no_gap():
    counts = count_gaps(torch.zeros(3, 5), ROUTER)
    assert median_gap(counts) == 0
    masked = torch.tensor([[1.0, 0.0, -torch.inf, -torch.inf, -torch.inf]])
    assert count_gaps(masked, ROUTER)[-1] == 1
    assert count_gaps(masked, replace(ROUTER, top_k=3))[0] == 1


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match="without tokens"):
        median_gap(torch.zeros(NUM_BINS, dtype=torch.int64))
    with pytest.raises(ValueError, match="experts drop tokens"):
        count_gaps(torch.zeros(3, 5), replace(ROUTER, top_k=None))
