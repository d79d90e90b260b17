"""What makes a curvature doubtful."""

import warnings

import pytest
import torch
from oracles.models import answer_logits, toy_batch, toy_model

from bmoe_lightning.curvature import collect_factors
from bmoe_lightning.laplace import LaplacePosterior
from bmoe_lightning.methods.curvature_warnings import discarded_energy, warn_of_discarded_energy
from bmoe_lightning.utils.fit_warnings import FitWarning


def posterior(rank):
    return LaplacePosterior(collect_factors(toy_model(), answer_logits, [toy_batch(num_rows=40)], rank=rank))


def test_a_low_rank_that_discards_most_is_said_with_the_worst_layer():
    small, whole = posterior(1), posterior(1000)
    shares = [1 - float(s.sum() / w.sum()) for s, w in zip(small.curvature, whole.curvature, strict=True)]
    total = 1 - sum(float(s.sum()) for s in small.curvature) / sum(float(w.sum()) for w in whole.curvature)
    worst = max(range(len(shares)), key=shares.__getitem__)
    assert max(shares) > 0.5
    name = small.factors.layers[worst].name
    with pytest.warns(FitWarning, match=rf"rank 1 discards {total:.0%} .* in layer {name} {shares[worst]:.0%}: var"):
        warn_of_discarded_energy(small)


def test_the_share_is_that_of_the_dense_curvature():
    small, whole = posterior(2), posterior(1000)
    found, none = discarded_energy(small), discarded_energy(whole)
    kept, full = (torch.stack([s.double().sum() for s in of.curvature]) for of in (small, whole))
    shares = 1 - kept / full
    assert found.rank == 2
    assert found.total == pytest.approx(float(1 - kept.sum() / full.sum()), rel=1e-4)
    assert found.worst == pytest.approx(float(shares.max()), rel=1e-4)
    assert found.worst_layer == small.factors.layers[int(shares.argmax())].name
    assert 0 <= none.total <= none.worst < 1e-4


def test_a_rank_that_keeps_most_is_fine():
    whole = posterior(1000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_discarded_energy(whole)
    assert all(torch.isfinite(s).all() for s in whole.curvature)
