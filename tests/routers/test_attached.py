"""Bayesian routers as a module beside a model: probing, scales, dtypes, and alarms."""

from __future__ import annotations

import pytest
import torch
from oracles.models import answer_logits, tiny_qwen, toy_batch, toy_model
from torch import nn

from bmoe_lightning.routers import (
    BayesianRouters,
    RouterOptions,
    TemperatureChoice,
    attached_routers,
    find_routers,
    intercepted_routers,
)
from bmoe_lightning.routers.attached import median_gaps

BATCH = toy_batch()


def run(model):
    return lambda: answer_logits(model, BATCH)[0]


def test_it_is_probed_once_and_scaled_by_gaps_of_real_tokens():
    model, logits = toy_model(), {}
    routers = BayesianRouters(model, RouterOptions())
    assert routers.lacks_scale
    assert [net.router.top_k for net in routers.nets] == [None, None]
    routers.probe(model, run(model))
    assert [(net.router.top_k, net.router.score) for net in routers.nets] == [(2, "softmax")] * 2
    routers.probe(None, None)
    wide = {name: torch.cat([BATCH[name], torch.zeros_like(BATCH[name])], 1) for name in ("ids", "mask")}
    counts = routers.gap_counts(model, lambda: answer_logits(model, {**BATCH, **wide})[0])
    assert torch.equal(counts, routers.gap_counts(model, run(model)))
    assert counts.sum(1).tolist() == [int(BATCH["mask"].sum())] * 2

    def keep(router, _u, found):
        logits[router.index] = found[BATCH["mask"].bool().flatten()]
        return found

    with torch.no_grad(), intercepted_routers(model, find_routers(model), keep):
        run(model)()
    for index, gap in enumerate(median_gaps(counts)):
        top = logits[index].topk(3, -1).values
        assert gap == pytest.approx(float((top[:, 1] - top[:, 2]).median()), rel=0.1)
    routers.set_scales([0.5, 2.0])
    assert [float(net.prior_scale) for net in routers.nets] == [0.5, 2.0]
    assert not routers.lacks_scale
    routers.set_scales([1.0, 1.0])  # those that have one keep it
    assert [float(net.prior_scale) for net in routers.nets] == [0.5, 2.0]
    with pytest.raises(ValueError, match=r"gives its noise no scale; pass prior_unit='one'"):
        BayesianRouters(model, RouterOptions()).set_scales([0.0, 1.0])


def test_the_way_of_drawn_experts_is_measured():
    model = tiny_qwen(norm_topk_prob=False).double()
    routers = BayesianRouters(model, RouterOptions("temperature"))
    assert isinstance(routers.nets[0], TemperatureChoice)
    routers.probe(model, run(model))
    assert [net.returns_choice for net in routers.nets] == [True, True]


def test_half_precision_rounds_no_weight():
    holder = nn.Module()
    holder.model = tiny_qwen().float()
    holder.beside = BayesianRouters(holder.model, RouterOptions())
    before = [parameter.clone() for parameter in holder.beside.parameters()]
    holder.to(torch.bfloat16)
    assert {p.dtype for p in holder.model.parameters()} == {torch.bfloat16}
    assert all(torch.equal(p, b) for p, b in zip(holder.beside.parameters(), before, strict=True))
    holder.double()
    assert {p.dtype for p in holder.beside.parameters()} == {torch.float64}


def test_the_routers_that_a_module_holds():
    holder = nn.Module()
    assert attached_routers(holder) is None
    holder.model = toy_model()
    holder.one = BayesianRouters(holder.model, RouterOptions(), [1])
    assert attached_routers(holder) is holder.one
    assert [net.router.index for net in holder.one.nets] == [1]
    assert [router.name for router in find_routers(holder)] == [f"model.{r.name}" for r in find_routers(holder.model)]
    holder.other = BayesianRouters(holder.model, RouterOptions())
    with pytest.raises(ValueError, match="holds 2 sets"):
        attached_routers(holder)


def test_alarms():
    model = tiny_qwen()
    gaussian = BayesianRouters(model, RouterOptions()).nets[0].collapse_alarm()
    assert [gaussian({"scale_ratio": 0.01}) is None for _ in range(100)] == [True] * 99 + [False]
    assert gaussian({"scale_ratio": 0.5}) is None
    drawn = BayesianRouters(model, RouterOptions("temperature")).nets[0]
    alarm, names = drawn.collapse_alarm(), ("gate_temperature", "gate_entropy")
    assert all(alarm(dict(zip(names, (1.0, 0.7), strict=True))) is None for _ in range(200))
    says = [alarm(dict(zip(names, (20.0, 1.38), strict=True))) for _ in range(100)]
    assert says[:-1] == [None] * 99
    assert "mean temperature of 20 (bounds 0.05 and 20)" in says[-1]
