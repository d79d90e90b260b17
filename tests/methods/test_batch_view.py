import pytest
import torch
from methods_cases import RANK3
from oracles.models import answer_logits

from bmoe_lightning.curvature import Curvature, collect_factors
from bmoe_lightning.laplace import LaplacePosterior
from bmoe_lightning.methods import BatchView


def test_a_view_runs_the_model_when_asked_and_once(model, batches):
    calls = []

    def counted(model, batch):
        calls.append(model.training)
        return answer_logits(model, batch)

    model.train()
    view = BatchView(model, counted, batches[0])
    assert calls == []
    assert view.logits is view.logits
    assert torch.equal(view.labels, batches[0]["labels"])
    assert calls == [False]
    assert model.training
    view.forward()
    assert len(calls) == 2


def test_all_posteriors_and_the_logits_share_one_forward(model, batches):
    posteriors = {}
    for curvature in (RANK3, Curvature(rank=2, fisher="mc")):
        factors = collect_factors(model, answer_logits, batches, rank=curvature.rank, fisher=curvature.fisher)
        posteriors[curvature.digest] = LaplacePosterior(factors, 2.0)
    calls = []

    def counted(model, batch):
        calls.append(batch)
        return answer_logits(model, batch)

    view = BatchView(model, counted, batches[0], posteriors)
    precision = torch.tensor([2.0, 2.0], dtype=torch.float64)
    for curvature in (RANK3, Curvature(rank=2, fisher="mc")):
        logits, covariance = view.covariance(curvature, precision)
        alone = posteriors[curvature.digest].logit_covariance(model, answer_logits, batches[0], centred=True)
        torch.testing.assert_close(logits, alone[0], rtol=1e-12, atol=0)
        torch.testing.assert_close(covariance, alone[1], rtol=1e-9, atol=1e-12)
    assert torch.equal(view.logits, logits)
    assert len(calls) == 1


def test_refuses_a_curvature_that_nobody_named(model, batches):
    with pytest.raises(RuntimeError, match="`curvatures` must name every curvature"):
        BatchView(model, answer_logits, batches[0]).terms(RANK3)
