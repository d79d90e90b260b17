"""torchao's stochastic rounding: unbiased, reproducible, resumable, and without effect on torch's random state."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bmoe_lightning.optim import make_adamw

pytest.importorskip("torchao")
pytestmark = [  # torchao compiles the update once, for a minute or so
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]
SHAPE = (8, 64, 32)


def made(seed=0, value=1.0, rate=1e-4):
    weight = nn.Parameter(torch.full(SHAPE, value, dtype=torch.bfloat16))
    return weight, make_adamw([weight], "stochastic_rounding", lr=rate, betas=(0.9, 0.95), seed=seed)


def take_steps(weight, optimizer, steps):
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    for step in steps:
        weight.grad = torch.full(SHAPE, 1.0 + step % 2, dtype=torch.bfloat16)
        optimizer.step()
        scheduler.step()


def test_small_updates_add_up_on_average():
    weight, optimizer = made()
    before = torch.get_rng_state()
    take_steps(weight, optimizer, range(100))
    assert torch.equal(torch.get_rng_state(), before)
    assert weight.dtype == torch.bfloat16
    # 100 updates of about the learning rate, of which nearest rounding keeps none; the spacing below 1 is 3.9e-3.
    assert 1 - float(weight.float().mean()) == pytest.approx(100 * 1e-4, rel=0.05)
    assert weight.unique().numel() > 3


def test_the_seed_decides_and_a_resumed_run_continues_bit_for_bit(tmp_path):
    weight, optimizer = made()
    take_steps(weight, optimizer, range(3))
    torch.save({"weight": weight, "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint")
    torch.rand(5)
    take_steps(weight, optimizer, range(3, 6))
    saved = torch.load(tmp_path / "checkpoint", weights_only=True)
    again, resumed = made(value=0.0)
    again.data.copy_(saved["weight"])
    resumed.load_state_dict(saved["optimizer"])
    take_steps(again, resumed, range(3, 6))
    assert torch.equal(again, weight)
    other, third = made(seed=1)
    take_steps(other, third, range(6))
    assert not torch.equal(other, weight)
