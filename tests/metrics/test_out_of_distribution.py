import math

import pytest
import torch

from bmoe_lightning.metrics import detect_errors, detect_out_of_distribution, detection_values


def shifted(shift, number=90, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(number, generator=generator), torch.randn(number // 2, generator=generator) + shift


def test_values_are_those_of_the_scores_and_intervals_contain_them():
    inside, outside = shifted(1.0)
    found = detect_out_of_distribution(inside, outside, num_samples=300)
    expected = detection_values(torch.cat([inside, outside]), torch.arange(135) >= 90)
    assert {name: estimate.value for name, estimate in found.items()} == expected
    for estimate in found.values():
        assert 0 <= estimate.low < estimate.value < estimate.high <= 1
    # Hanley and McNeil 1982.
    a = found["auroc"].value
    variance = a * (1 - a) + 44 * (a / (2 - a) - a**2) + 89 * (2 * a**2 / (1 + a) - a**2)
    width = 2 * 1.96 * math.sqrt(variance / (90 * 45))
    assert found["auroc"].high - found["auroc"].low == pytest.approx(width, rel=0.2)


def test_perfect_and_reversed_scores():
    inside, outside = torch.zeros(5), torch.ones(4)
    perfect = detect_out_of_distribution(inside, outside, num_samples=20)
    assert [(e.low, e.value, e.high) for e in perfect.values()] == [(1, 1, 1), (1, 1, 1), (0, 0, 0)]
    assert detect_out_of_distribution(outside, inside, num_samples=20)["auroc"].value == 0


def test_seeded_and_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    first = detect_out_of_distribution(*shifted(1.0), num_samples=50, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert detect_out_of_distribution(*shifted(1.0), num_samples=50, seed=1) == first
    assert detect_out_of_distribution(*shifted(1.0), num_samples=50, seed=2) != first


def test_errors_of_one_kind_have_no_value():
    score = torch.rand(20)
    wrong = torch.arange(20) < 6
    found = detect_errors(score, wrong, num_samples=200)
    assert found["auroc"].low <= found["auroc"].value <= found["auroc"].high
    assert math.isnan(detect_errors(score, torch.zeros(20).bool(), num_samples=10)["auroc"].low)
    # A single error is missing from a third of the resamples.
    assert math.isfinite(detect_errors(score, torch.arange(20) == 3, num_samples=100)["fpr95"].high)


def test_refusals():
    with pytest.raises(ValueError, match="none empty"):
        detect_out_of_distribution(torch.ones(3), torch.ones(0))
    with pytest.raises(ValueError, match="NaN"):
        detect_out_of_distribution(torch.ones(3), torch.tensor([torch.nan]))
    with pytest.raises(ValueError, match="num_samples"):
        detect_errors(torch.rand(4), torch.arange(4) < 2, num_samples=0)
