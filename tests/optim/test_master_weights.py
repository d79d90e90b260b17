"""AdamW with a float32 copy against torch's AdamW over float32 weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from bmoe_lightning.optim import MasterWeightAdamW
from bmoe_lightning.optim import master_weights as file

SHAPES = ((4, 6, 5), (7,), (3, 8), ())
SETTINGS = {"lr": 3e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}


def parameters(dtype, seed=0, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).bfloat16().to(dtype)) for shape in shapes]


def gradients(step, shapes=SHAPES, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def take_steps(optimizer, trained, steps):
    for step in steps:
        for parameter, gradient in zip(trained, gradients(step), strict=True):
            parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_copy_is_what_float32_weights_become_bit_for_bit(dtype):
    half, single = parameters(dtype), parameters(torch.float32)
    optimizer, reference = MasterWeightAdamW(half, **SETTINGS), torch.optim.AdamW(single, **SETTINGS)
    for step in range(20):
        for parameter, twin, gradient in zip(half, single, gradients(step, dtype=dtype), strict=True):
            parameter.grad, twin.grad = gradient, gradient.float()
        optimizer.step()
        reference.step()
        for parameter, twin in zip(half, single, strict=True):
            assert torch.equal(optimizer.state[parameter]["master"], twin)
            assert torch.equal(parameter, twin.to(dtype))
            assert optimizer.state[parameter]["exp_avg_sq"].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_weights_are_updated_as_by_torch(dtype):
    ours, theirs = parameters(dtype), parameters(dtype)
    optimizer, reference = MasterWeightAdamW(ours, **SETTINGS), torch.optim.AdamW(theirs, **SETTINGS)
    take_steps(optimizer, ours, range(5))
    take_steps(reference, theirs, range(5))
    assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))
    assert all("master" not in state for state in optimizer.state.values())


def test_updates_below_the_spacing_add_up():
    """From 1 in steps of 1e-4, where the spacing of bfloat16 is 7.8e-3 above 1 and 3.9e-3 below."""
    moved = {}
    for name, kind in {"copy": MasterWeightAdamW, "plain": torch.optim.AdamW}.items():
        weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
        optimizer = kind([weight], lr=1e-4, weight_decay=0.0)
        for _ in range(100):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        moved[name] = 1 - weight.item()
    assert moved["copy"] == pytest.approx(100 * 1e-4, abs=2e-3)
    assert moved["plain"] == 0


@pytest.mark.parametrize("divided", [True, False])
def test_few_weights_at_a_time_give_the_same(monkeypatch, divided):
    whole, parts = parameters(torch.bfloat16), parameters(torch.bfloat16)
    monkeypatch.setattr(file, "_is_divided", lambda part: False)
    optimizer, other = MasterWeightAdamW(whole, **SETTINGS), MasterWeightAdamW(parts, **SETTINGS)
    take_steps(optimizer, whole, range(3))
    monkeypatch.setattr(file, "_is_divided", lambda part: divided)
    monkeypatch.setattr(file, "CHUNK", 30)
    monkeypatch.setattr(file, "_PIECE", 32)
    take_steps(other, parts, range(3))
    together = [len(chunk) for chunk in file._together([other._part(parameter) for parameter in parts])]
    assert together == ([1] * 7 if divided else [1, 1, 2])
    for parameter, twin in zip(whole, parts, strict=True):
        assert torch.equal(parameter, twin)
        states = optimizer.state[parameter], other.state[twin]
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_resumed_run_continues_bit_for_bit(tmp_path):
    trained = parameters(torch.bfloat16)
    optimizer = MasterWeightAdamW(trained, **SETTINGS)
    take_steps(optimizer, trained, range(5))
    torch.save({"weights": trained, "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint")
    take_steps(optimizer, trained, range(5, 10))

    saved = torch.load(tmp_path / "checkpoint", weights_only=True)
    resumed = parameters(torch.bfloat16, seed=1)
    again = MasterWeightAdamW(resumed, lr=1.0)
    for parameter, value in zip(resumed, saved["weights"], strict=True):
        parameter.data.copy_(value)
    again.load_state_dict(saved["optimizer"])
    take_steps(again, resumed, range(5, 10))
    for parameter, twin in zip(trained, resumed, strict=True):
        assert torch.equal(parameter, twin)
        states = optimizer.state[parameter], again.state[twin]
        assert {name: value.dtype for name, value in states[1].items()} == dict.fromkeys(states[0], torch.float32)
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_loaded_state_shares_no_memory():
    trained = parameters(torch.bfloat16)
    optimizer = MasterWeightAdamW(trained, **SETTINGS)
    take_steps(optimizer, trained, range(2))
    state = optimizer.state_dict()
    before = copy.deepcopy(state["state"])
    again = MasterWeightAdamW(parameters(torch.bfloat16), **SETTINGS)
    again.load_state_dict(state)
    take_steps(again, again.param_groups[0]["params"], range(2, 4))
    for number, values in before.items():
        assert all(torch.equal(state["state"][number][name], values[name]) for name in ("master", "exp_avg"))


def test_the_state_of_torchs_adamw_is_continued():
    trained = parameters(torch.bfloat16)
    plain = torch.optim.AdamW(trained, **SETTINGS)
    take_steps(plain, trained, range(2))
    optimizer = MasterWeightAdamW(trained, **SETTINGS)
    optimizer.load_state_dict(plain.state_dict())
    before = [parameter.detach().float() for parameter in trained]
    take_steps(optimizer, trained, [2])
    for parameter, start in zip(trained, before, strict=True):
        state = optimizer.state[parameter]
        assert (state["step"].item(), state["exp_avg"].dtype) == (3, torch.float32)
        assert float((state["master"] - start).abs().max()) < 2 * SETTINGS["lr"]


def test_weights_that_something_else_wrote_replace_the_copy():
    trained = parameters(torch.bfloat16)
    optimizer = MasterWeightAdamW(trained, **SETTINGS)
    take_steps(optimizer, trained, range(3))
    first = trained[0]
    kept = optimizer.state[first]["master"].clone()
    with torch.no_grad():
        first[0] = 5.0
        trained[1].copy_(trained[1].clone())  # swapped out and in again: the same bits
    second = optimizer.state[trained[1]]["master"].clone()
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    take_steps(optimizer, trained, [3])
    master = optimizer.state[first]["master"]
    assert master[0].unique().tolist() == [5.0]
    assert torch.equal(master[1:], kept[1:])
    assert torch.equal(optimizer.state[trained[1]]["master"], second)


def test_parameters_without_a_gradient_and_closures():
    trained = parameters(torch.bfloat16)
    optimizer = MasterWeightAdamW(trained, **SETTINGS)
    before = trained[0].detach().clone()

    def closure():
        assert torch.is_grad_enabled()
        trained[1].grad = torch.ones_like(trained[1])
        return 3.0

    assert optimizer.step(closure) == 3.0
    assert torch.equal(trained[0], before)
    assert list(optimizer.state) == [trained[1]]
