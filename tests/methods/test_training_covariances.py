"""Covariance terms of training examples: from how many batches, on every rank alike."""

from __future__ import annotations

import pytest
from oracles.models import answer_logits, split, toy_batch, toy_model

from bmoe_lightning.curvature import collect_factors
from bmoe_lightning.laplace import LaplacePosterior
from bmoe_lightning.methods import training_covariances
from bmoe_lightning.methods.training_covariances import training_terms

BATCHES = split(toy_batch(num_rows=12, seed=3), 4, 4, 4)


@pytest.fixture(scope="module")
def posterior():
    return LaplacePosterior(collect_factors(toy_model(), answer_logits, BATCHES, rank=2))


@pytest.mark.parametrize(("asked", "taken"), [(1, 4), (4, 4), (5, 8), (12, 12), (100, 12)])
def test_takes_whole_batches(posterior, asked, taken):
    cache = training_terms(posterior, toy_model(), answer_logits, BATCHES, asked, max_bytes=1 << 20)
    assert len(cache.logits) == taken


def test_ranks_in_lockstep_end_together(posterior, monkeypatch):
    sizes = []

    def gathered(number):
        sizes.append(number)
        return [number, 1]  # another rank has batches of one example

    monkeypatch.setattr(training_covariances, "runs_in_lockstep", lambda _: True)
    monkeypatch.setattr(training_covariances, "gather_number", gathered)
    cache = training_terms(posterior, toy_model(), answer_logits, BATCHES, 2, max_bytes=1 << 20)
    assert sizes == [4, 4]
    assert len(cache.logits) == 8
