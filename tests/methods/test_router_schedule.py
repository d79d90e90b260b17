"""The schedule of a router training: learning rates, and the steps after which states are collected."""

from __future__ import annotations

import math

import pytest
import torch

from bmoe_lightning.methods.router_schedule import (
    RouterTrainingOptions,
    collecting_steps,
    rate_share,
    router_optimizer,
)
from bmoe_lightning.routers import MeanFieldLogits, Router


def test_the_steps_after_which_weights_are_collected():
    assert collecting_steps(5, 12) == {2, 5, 7, 10, 12}
    assert collecting_steps(20, 4) == {1, 2, 3, 4}
    assert collecting_steps(20, 20) == set(range(1, 21))
    assert collecting_steps(3, 100) == {33, 67, 100}
    assert collecting_steps(0, 5) == set()
    for steps in (1, 7, 19, 20, 23, 55):
        assert len(collecting_steps(20, steps)) == min(20, steps)


def test_the_learning_rate_warms_up_and_falls_along_half_a_cosine():
    options = RouterTrainingOptions(1, None, warmup=0.1)
    found = [rate_share(step, 40, options) for step in range(40)]
    assert found[:4] == [0.25, 0.5, 0.75, 1.0]
    assert found[4:] == pytest.approx([0.5 * (1 + math.cos(math.pi * step / 36)) for step in range(36)])
    constant = RouterTrainingOptions(1, None, optimizer="sgd")
    assert {rate_share(step, 40, constant) for step in range(40)} == {1.0}


@pytest.mark.parametrize(("rate", "expected"), [(None, [0.04, 0.02]), (0.3, [0.3, 0.3])])
def test_each_router_has_the_rate_of_its_width(rate, expected):
    nets = [MeanFieldLogits(Router("", index, 4, width, ""), 1.0) for index, width in enumerate((16, 32))]
    for kind, name in ((torch.optim.AdamW, "adamw"), (torch.optim.SGD, "sgd")):
        optimizer = router_optimizer(nets, RouterTrainingOptions(1, rate, optimizer=name, weight_decay=0.2))
        assert type(optimizer) is kind
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(expected)
        assert all(group["weight_decay"] == 0.2 for group in optimizer.param_groups)
        assert [len(group["params"]) for group in optimizer.param_groups] == [len(list(n.parameters())) for n in nets]
