"""Full-covariance routers as a method: the forms, and what is refused before training."""

from __future__ import annotations

from dataclasses import replace

import pytest
from methods_cases import predict
from oracles.models import answer_logits, toy_batch, toy_model

from bmoe_lightning.methods import FullCovarianceRouter, fit_methods

HELD_OUT = toy_batch(num_rows=30, seed=5)


@pytest.mark.parametrize("rank", [None, 2])
def test_forms_have_heads_of_their_own(rank):
    method = FullCovarianceRouter(num_samples=2, epochs=1, rank=rank)
    model = toy_model()
    state = fit_methods([method], model, answer_logits, [HELD_OUT], [HELD_OUT]).state_of(method)
    assert state["net.0.head"].shape == ((10 if rank is None else 12), 1)  # D / 4 is 1
    assert predict(method, model, HELD_OUT, state).isfinite().all()
    with pytest.raises(ValueError, match="the options that they were trained with"):
        predict(replace(method, rank=3), model, HELD_OUT, state)


def test_many_experts_are_refused_before_training():
    model = toy_model(num_experts=130, num_layers=1)
    with pytest.raises(ValueError, match="130 experts"):
        FullCovarianceRouter().check_run(model, None)
    FullCovarianceRouter(rank=8).check_run(model, None)
    with pytest.raises(ValueError, match="at least 1"):
        FullCovarianceRouter(rank=0)
