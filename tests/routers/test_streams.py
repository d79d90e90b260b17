"""Random numbers depend on what they are for alone."""

from __future__ import annotations

import math

import pytest
import torch

from bmoe_lightning.routers import sample_noise, step_noise

KINDS = pytest.mark.parametrize("kind", ["normal", "uniform", "gumbel"])


def noise(shape=(7, 3), samples=range(4), **options):
    return sample_noise(shape, **({"seed": 5, "router": 2, "samples": samples} | options))


@KINDS
@pytest.mark.parametrize("antithetic", [False, True])
def test_chunks_of_samples_and_longer_rows(kind, antithetic):
    options = {"kind": kind, "antithetic": antithetic}
    every = noise(samples=range(9), **options)
    assert every.shape == (9, 7, 3)
    assert every.dtype == torch.float32
    for size in (1, 2, 3, 9):
        chunks = [noise(samples=range(9)[start : start + size], **options) for start in range(0, 9, size)]
        assert torch.equal(torch.cat(chunks), every)
    for length in (1, 2, 6, 40):
        longer = noise((length, 3), range(9), **options)
        assert torch.equal(longer[:, :7], every[:, :length])
    assert noise(samples=[], **options).shape == (0, 7, 3)


@KINDS
def test_every_part_of_the_key_matters(kind):
    first = noise(samples=[1], kind=kind)
    others = [noise(samples=[2], kind=kind), noise(samples=[1], seed=6, kind=kind)]
    others += [noise(samples=[1], router=3, kind=kind), noise(samples=[2], seed=5, router=1, kind=kind)]
    others += [step_noise((7, 3), seed=5, router=2, step=step, kind=kind)[None] for step in (1, 2)]
    for index, other in enumerate(others):
        assert not any(torch.isin(other, known).any() for known in (first, *others[:index]))
    assert torch.equal(first, noise(samples=[1], kind=kind))


def test_distributions():
    normal = noise((20_000,), range(5))
    assert normal.mean().abs() < 0.02
    assert (normal.std() - 1).abs() < 0.02
    assert torch.corrcoef(normal).triu(1).abs().max() < 0.03
    uniform = noise((20_000,), range(5), kind="uniform")
    assert uniform.min() > 0
    assert uniform.max() < 1
    assert (uniform.mean() - 0.5).abs() < 0.01
    assert (uniform.std() - 12**-0.5).abs() < 0.01
    gumbel = noise((20_000,), range(5), kind="gumbel")
    assert torch.equal(gumbel, -(-uniform.log()).log())
    assert (gumbel.mean() - 0.5772).abs() < 0.02
    assert (gumbel.std() - math.pi / 6**0.5).abs() < 0.02


def test_mirrored_samples():
    normal, uniform = noise(antithetic=True), noise(antithetic=True, kind="uniform")
    assert torch.equal(normal[1::2], -normal[::2])
    torch.testing.assert_close(uniform[1::2], 1 - uniform[::2])
    gumbel = noise(antithetic=True, kind="gumbel")
    assert torch.equal(gumbel, -(-uniform.log()).log())
    assert not torch.equal(normal[0], normal[2])
    assert torch.equal(normal[::2], noise(samples=[0, 2]))


def test_the_global_generator_is_left_alone():
    state = torch.get_rng_state()
    noise()
    step_noise((2, 3), seed=0, router=0, step=0)
    assert torch.equal(torch.get_rng_state(), state)
