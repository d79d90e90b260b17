"""A further covariance beside the terms of a validation set, for exact and for compact terms."""

from __future__ import annotations

import pytest
import torch
from validation_sets import PRECISIONS, at, compact, set_of

from bmoe_lightning.laplace.predictive import class_probabilities
from bmoe_lightning.laplace.prior import fit_lpo, validation_nll
from bmoe_lightning.laplace.validation_cache import cache_terms
from bmoe_lightning.laplace.widened_cache import WidenedCache


def deviations_of(logits, num_routes, seed=0):
    """Centred deviations `[N, K, R]`, zero for absent classes."""
    present = (logits != -torch.inf).unsqueeze(2)
    drawn = torch.randn(*logits.shape, num_routes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    drawn = torch.where(present, drawn, 0)
    return torch.where(present, drawn - drawn.sum(1, keepdim=True) / present.sum(1, keepdim=True), 0)


MAKES = {"exact": cache_terms, "compact": compact}


@pytest.mark.parametrize("num_routes", [2, 9])  # fewer and more than classes
@pytest.mark.parametrize("make", MAKES)
class TestBothKindsOfTerms:
    @pytest.mark.parametrize("values", PRECISIONS[1:])
    def test_the_loss_is_that_of_the_sum_of_the_covariances(self, make, num_routes, values):
        batches, curvature, dense = set_of(40, 5)
        cache = MAKES[make](batches, curvature)
        mean, deviations = cache.logits + 0.5, deviations_of(cache.logits, num_routes)
        widened = WidenedCache.of(cache, mean, deviations)
        total = dense(at(values)) + deviations @ deviations.mT
        assert (widened.covariance(at(values)) - total).abs().max() < 5e-3 * total.abs().max()
        log_probs = class_probabilities(mean, total, num_samples=20_000)
        expected = -log_probs.gather(1, cache.labels.unsqueeze(1)).mean()
        found = validation_nll(widened, at(values), num_samples=20_000)
        assert found == pytest.approx(float(expected), abs=0.02)
        assert abs(found - validation_nll(cache, at(values), num_samples=20_000)) > 0.05

    def test_without_deviations_it_is_the_cache_itself(self, make, num_routes):
        batches, curvature, _ = set_of(30, 5)
        cache = MAKES[make](batches, curvature)
        widened = WidenedCache.of(cache, cache.logits, torch.zeros(*cache.logits.shape, num_routes).double())
        assert validation_nll(widened, at(PRECISIONS[1])) == validation_nll(cache, at(PRECISIONS[1]))
        found = fit_lpo(widened, "global", num_samples=100)
        assert torch.equal(found, fit_lpo(cache, "global", num_samples=100))

    def test_an_infinite_precision_leaves_the_deviations_alone(self, make, num_routes):
        batches, curvature, _ = set_of(40, 5)
        cache = MAKES[make](batches, curvature)
        deviations = deviations_of(cache.logits, num_routes)
        widened = WidenedCache.of(cache, cache.logits, deviations)
        found = validation_nll(widened, at([torch.inf, torch.inf]), num_samples=20_000)
        log_probs = class_probabilities(cache.logits, deviations @ deviations.mT, num_samples=20_000)
        expected = -log_probs.gather(1, cache.labels.unsqueeze(1)).mean()
        assert found == pytest.approx(float(expected), abs=0.02)
        nothing = validation_nll(cache, at([torch.inf, torch.inf]))
        plain = torch.nn.functional.cross_entropy(cache.logits, cache.labels)
        assert nothing == pytest.approx(float(plain), rel=1e-5)


def test_a_subset_has_its_own_deviations():
    """Where only some examples have terms, those of the others are left out."""
    batches, curvature, _ = set_of(400, 5)
    cache = compact(batches, curvature, max_bytes=300_000)
    logits = cache.all_examples()[0]
    deviations = deviations_of(logits, 2)
    widened = WidenedCache.of(cache, logits, deviations)
    assert len(widened.logits) < len(logits)
    position = [int((logits == row).all(1).nonzero()) for row in widened.logits]
    assert torch.equal(widened.deviations, deviations[position])
    assert torch.equal(widened.positions(), cache.positions())
    assert widened.all_examples()[0] is logits
    assert not widened.is_exact
    assert widened.num_layers == cache.num_layers
