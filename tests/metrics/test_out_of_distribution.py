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


def test_the_direction_is_fixed_whatever_the_data_say():
    """A score that points the wrong way: it is never turned round, and its interval is below one half."""
    inside, outside = shifted(-1.5)
    found = detect_out_of_distribution(inside, outside, num_samples=300)
    assert found["auroc"].value < found["auroc"].high < 0.5
    assert found["fpr95"].value > 0.95
    right_way = detect_out_of_distribution(-inside, -outside, num_samples=300)
    assert found["auroc"].value == pytest.approx(1 - right_way["auroc"].value)
    assert found["auroc"].low == pytest.approx(1 - right_way["auroc"].high, abs=0.01)


def test_several_models_have_the_mean_of_their_values():
    pairs = [shifted(shift, seed=seed) for seed, shift in enumerate((0.2, 1.0, 2.0))]
    each = [detect_out_of_distribution(*pair, num_samples=300) for pair in pairs]
    inside, outside = (torch.stack(parts) for parts in zip(*pairs, strict=True))
    found = detect_out_of_distribution(inside, outside, num_samples=300)
    for name, estimate in found.items():
        assert estimate.value == pytest.approx(sum(of_one[name].value for of_one in each) / 3)
    widths = [of_one["auroc"].high - of_one["auroc"].low for of_one in each]
    assert found["auroc"].high - found["auroc"].low < max(widths)
    # Copies of one model are one model.
    copies = detect_out_of_distribution(inside[:1].repeat(2, 1), outside[:1].repeat(2, 1), num_samples=300)
    assert copies["auroc"].low == pytest.approx(each[0]["auroc"].low)
    assert copies["auroc"].high == pytest.approx(each[0]["auroc"].high)


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
    with pytest.raises(ValueError, match="of as many models"):
        detect_out_of_distribution(torch.ones(2, 3), torch.ones(1, 3))
    with pytest.raises(ValueError, match="NaN"):
        detect_out_of_distribution(torch.ones(3), torch.tensor([torch.nan]))
    with pytest.raises(ValueError, match="num_samples"):
        detect_errors(torch.rand(4), torch.arange(4) < 2, num_samples=0)
