"""What random routers add to a model, from its configuration."""

from __future__ import annotations

import json

import pytest
import torch

from bmoe_lightning.methods import get_method, method_names
from bmoe_lightning.methods.routing_cost import routing_cost
from bmoe_lightning.routers.costs import diagonal_cost, temperature_cost
from recipes.plan.architecture import build, describe, load_configuration
from recipes.plan.compute import Workload, active_macs
from recipes.plan.report import make_plan, plan_json, plan_text
from recipes.plan.routers import router_plans, routers_text
from recipes.plan.settings import PlanSettings


@pytest.fixture(scope="module")
def qwen():
    return describe(build(load_configuration("qwen1.5-moe-a2.7b"), torch.bfloat16))


def test_active_multiply_adds_are_the_active_weights_without_the_embedding(qwen):
    assert active_macs(qwen) == pytest.approx(qwen.active - qwen.vocabulary * qwen.hidden, rel=1e-3)


def test_shares_of_the_papers_routers(qwen):
    """Ten layers, 35 samples; shares counted from the shapes of https://arxiv.org/abs/2603.09453."""
    macs = active_macs(qwen)
    assert diagonal_cost(2048, 60, 35).share(10, macs) == pytest.approx(0.0051, rel=0.02)
    assert temperature_cost(2048, 60).share(10, macs) == pytest.approx(0.0044, rel=0.02)


def test_every_method_that_counts_is_planned(qwen):
    work = Workload(8, 256, 4, 10)
    plans = {plan.method: plan for plan in router_plans(qwen, work)}
    routed = [get_method(name) for name in method_names() if get_method(name).needs.routers]
    assert set(plans) == {method.name for method in routed if routing_cost(method, 2048, 60) is not None}
    noise = plans["router_noise"]
    assert noise.passes == get_method("router_noise").num_samples
    assert noise.share == pytest.approx(24 * 60 / active_macs(qwen))
    assert noise.forwards == pytest.approx(noise.passes, rel=1e-3)
    assert noise.transient == 3 * 4 * 8 * 256 * 60


def test_it_is_part_of_the_plan():
    plan = make_plan(PlanSettings("qwen1.5-moe-a2.7b"))
    assert routers_text(plan.routers) in plan_text(plan)
    (entry,) = (entry for entry in json.loads(plan_json(plan))["routers"] if entry["method"] == "router_noise")
    assert entry["passes"] == plan.routers[0].passes
    assert routers_text([]) == ""
