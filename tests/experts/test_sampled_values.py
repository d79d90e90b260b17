"""Samples of the same weights are recognised whatever their rounding, and those of others are not."""

from __future__ import annotations

import math

import pytest
import torch

from bmoe_lightning.experts.sampled_values import SampledValues, _half_spacing, sampled_values

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
HALF = [torch.bfloat16, torch.float16]
LEARNING_RATE = 5e-5


def stored(scale=0.02, seed=0, size=(4, 60, 64)):
    return scale * torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sampled(weights, dtype, merged=False):
    return sampled_values([weights.to(torch.float32 if merged else dtype)], dtype, sharded=False)


def noise(weights, seed=1):
    return torch.randn(weights.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same(one, other):
    assert one.same(other) == other.same(one)
    return one.same(other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("other", DTYPES)
class TestPrecisions:
    def test_weights_that_are_loaded_in_another_precision(self, dtype, other):
        assert same(sampled(stored(), dtype), sampled(stored(), other))

    def test_arithmetic_that_rounds_differently_in_float32(self, dtype, other):
        """As a merge of adapters on another machine does: some values fall on the other side of a rounding."""
        moved = stored() * (1 + 1e-7 * noise(stored()))
        assert same(sampled(stored(), dtype), sampled(moved, other))
        assert same(sampled(stored().to(dtype), dtype, merged=True), sampled(stored(), other))

    def test_a_training_step_is_another(self, dtype, other):
        moved = stored() + LEARNING_RATE * noise(stored()).sign()
        assert not same(sampled(stored(), dtype), sampled(moved, other))

    def test_another_size_is_another(self, dtype, other):
        assert not same(sampled(stored(), dtype), sampled(stored(size=(3, 60, 64)), other))
        assert not same(sampled(stored(), dtype), sampled(torch.cat([stored(), stored()]), other))


@pytest.mark.parametrize("dtype", HALF)
def test_more_neighbours_than_rounding_leaves_are_another(dtype):
    """Each value at most one step of the precision away, which a training in it does to some per cent of them."""
    weights = stored(size=(64, 60, 64)).to(dtype)
    step = (weights.view(torch.int16) + 1).view(dtype)
    values = sampled(weights, dtype)
    for share, expected in ((5e-4, True), (5e-3, False)):
        chosen = torch.rand(values.values.shape, generator=torch.Generator().manual_seed(2)) < share
        assert bool(chosen.any())
        moved = SampledValues(torch.where(chosen, sampled(step, dtype).values, values.values), dtype)
        assert same(values, moved) == expected
    one = values.values.clone()
    one[0] *= 1.1  # further than a neighbour
    assert not same(values, SampledValues(one, dtype))


@pytest.mark.parametrize("dtype", HALF)
def test_half_a_spacing_by_the_neighbours(dtype):
    values = torch.tensor([1.5, -1.5, 3e-3, 0.02, 1000.0, 0.0, 1e-6]).to(dtype)
    above = (values.abs().view(torch.int16) + 1).view(dtype)
    expected = (above.double() - values.abs().double()) / 2
    found = _half_spacing(values.float(), dtype)
    is_normal = values.abs() >= torch.finfo(dtype).smallest_normal
    torch.testing.assert_close(found[is_normal], expected[is_normal], rtol=0, atol=0)
    assert bool((found >= expected).all())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_equals_itself_alone(value):
    weights = stored()
    weights[0, 0, 0] = value
    assert same(sampled(weights, torch.float32), sampled(weights, torch.float32))
    assert not same(sampled(weights, torch.float32), sampled(stored(), torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_there_and_back_as_text(dtype):
    values = sampled(stored(), dtype)
    found = SampledValues.from_text(*values.text())
    assert found.dtype == values.dtype
    assert torch.equal(found.values, values.values)
    assert found.text() == values.text()


@pytest.mark.parametrize(
    "text", [("float32", "AAA"), ("float32", "AAAAAAA="), ("float32", [1]), ("nn", "AAAAAA=="), ("float31", "AAAAAA==")]
)
def test_damaged_text(text):
    with pytest.raises((AttributeError, TypeError, ValueError)):
        SampledValues.from_text(*text)


def test_no_values_at_all():
    empty = sampled_values([torch.empty(0, 4)], torch.float32, sharded=False)
    assert empty.same(SampledValues.from_text(*empty.text()))
