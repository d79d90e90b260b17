import math

import pytest
import torch

from bmoe_lightning.metrics import METRICS, negative_log_likelihood, paired_difference


def methods(num_seeds, number=60, effect=0.0, seed_noise=0.0, seed=0, own_items=False):
    """Two methods whose logits differ by a scale that varies over training seeds; the same examples for all seeds."""
    generator = torch.Generator().manual_seed(seed)
    first, second, targets = [], [], []
    logits = None
    for _ in range(num_seeds):
        if logits is None or own_items:
            logits = torch.randn(number, 4, generator=generator, dtype=torch.float64)
            target = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
        scale = 1 + effect + seed_noise * float(torch.randn((), generator=generator))
        first.append((scale * logits).log_softmax(1))
        second.append(logits.log_softmax(1))
        targets.append(target)
    return first, second, targets


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_the_interval_contains_the_difference(metric):
    first, second, targets = methods(3, effect=1.0, seed_noise=0.2)
    found = paired_difference(first, second, targets, metric.name, num_samples=50)
    assert found.low <= found.value <= found.high
    same = paired_difference(first, first, targets, metric.name, num_samples=20)
    assert (same.low, same.value, same.high) == (0, 0, 0)
    swapped = paired_difference(second, first, targets, metric.name, num_samples=20)
    assert swapped.value == pytest.approx(-found.value, abs=1e-12)


def test_the_value_is_the_mean_over_seeds_and_the_width_that_of_the_paired_differences():
    first, second, targets = methods(1, number=400, effect=1.0)
    found = paired_difference(first, second, targets, num_samples=2000)
    losses = [-p[0].gather(1, targets[0][:, None]).squeeze(1) for p in (first, second)]
    difference = losses[0] - losses[1]
    assert found.value == pytest.approx(difference.mean().item())
    half = 1.96 * float(difference.std()) / 20
    assert found.high - found.low == pytest.approx(2 * half, rel=0.1)
    assert found.excludes_zero == (abs(found.value) > half)
    first, second, targets = methods(3, effect=0.5, seed_noise=0.3)
    values = [
        negative_log_likelihood(a, y) - negative_log_likelihood(b, y)
        for a, b, y in zip(first, second, targets, strict=True)
    ]
    assert paired_difference(first, second, targets, num_samples=10).value == pytest.approx(float(sum(values)) / 3)


@pytest.mark.parametrize("own_items", [False, True])
def test_seeds_are_clusters(own_items):
    """Where methods differ by the training seed alone, the interval is that of a mean of S seeds."""
    first, second, targets = methods(6, number=3000, seed_noise=0.5, own_items=own_items)
    found = paired_difference(first, second, targets, num_samples=1000, same_items=not own_items)
    values = [
        negative_log_likelihood(a, y) - negative_log_likelihood(b, y)
        for a, b, y in zip(first, second, targets, strict=True)
    ]
    width = 2 * 1.96 * float(torch.stack(values).std()) / math.sqrt(6)
    assert found.high - found.low == pytest.approx(width, rel=0.25)
    alone = paired_difference(first[:1], second[:1], targets[:1], num_samples=200)
    assert alone.high - alone.low < width


@pytest.mark.slow
@pytest.mark.parametrize(("num_seeds", "least"), [(1, 0.9), (3, 0.85), (5, 0.88)])
def test_no_difference_is_found_where_there_is_none(num_seeds, least):
    """Coverage of 0 by nominal 95 % intervals: accuracies of two methods that differ by independent noise."""
    covered = 0
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        target = torch.randint(2, (100,), generator=generator)
        draws = torch.rand(2, num_seeds, 100, generator=generator) < 0.7
        answers = torch.where(draws, target, 1 - target)
        p = torch.nn.functional.one_hot(answers, 2).double().mul(0.8).add(0.1).log()
        covered += not paired_difference(p[0], p[1], [target] * num_seeds, "acc", num_samples=200).excludes_zero
    assert covered / 200 >= least


def test_seeded_and_the_global_generator_is_left_alone():
    data = methods(2, seed_noise=0.3)
    before = torch.get_rng_state()
    first = paired_difference(*data, num_samples=50, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert paired_difference(*data, num_samples=50, seed=1) == first
    assert paired_difference(*data, num_samples=50, seed=2) != first


def test_refusals():
    first, second, targets = methods(2, number=10)
    with pytest.raises(ValueError, match="for each training seed, found 1, 2 and 2"):
        paired_difference(first[:1], second, targets)
    with pytest.raises(ValueError, match="found 0, 0 and 0"):
        paired_difference([], [], [])
    with pytest.raises(ValueError, match="no metric 'wer'; take one of acc, ece"):
        paired_difference(first, second, targets, "wer")
    with pytest.raises(ValueError, match="same_items=False"):
        paired_difference(first, second, [targets[0], 3 - targets[0]])
    with pytest.raises(ValueError, match="log_softmax"):
        paired_difference([p.exp() for p in first], second, targets)
