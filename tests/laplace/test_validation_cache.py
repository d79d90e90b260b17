"""Covariance terms of a validation set."""

import pytest
import torch

from bmoe_lightning.laplace.covariance import BatchTerms, LayerTerms
from bmoe_lightning.laplace.validation_cache import cache_terms


def test_bins_keep_the_sum_of_products():
    """Whatever the bins do to shrinkage, their total is `sum R_i R_j` exactly."""
    projections = torch.randn(7, 3, 2, 4, dtype=torch.float64)
    examples, experts = torch.tensor([0, 0, 1, 1, 1, 2, 3]), torch.randint(3, (7,))
    curvature = torch.rand(3, 2, 4, dtype=torch.float64) ** 8
    curvature[1, 0, 0] = 0
    layer = LayerTerms(torch.zeros(4, 3, 3, dtype=torch.float64), projections, examples, experts)
    logits = torch.zeros(4, 4, dtype=torch.float64)
    embedding = torch.zeros(4, 4, 3, dtype=torch.float64)
    cache = cache_terms([BatchTerms(logits, torch.zeros(4, dtype=torch.int64), embedding, (layer,))], [curvature])
    flat = projections.flatten(2)
    expected = torch.zeros(4, 3, 3, dtype=torch.float64).index_add_(0, examples, flat @ flat.mT)
    torch.testing.assert_close(cache.binned[:, 0].sum(1), expected)
    assert bool((cache.centres[0].diff() > 0).all())
    assert float(cache.centres[0, -1]) == pytest.approx(float(curvature.max()))
