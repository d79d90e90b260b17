"""The prediction rejection ratio against a loop over answers, and its limits."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from bmoe_lightning.metrics import prediction_rejection_ratio, rejection_ratio_interval, weighted_rejection_ratio


def by_hand(score, quality, max_rejection=1.0):
    """The mean over all orders of tied answers, for few of them."""

    def area(order):
        means = [sum(quality[i] for i in order[:k]) / k for k in range(1, len(order) + 1)]
        rejected = max(1, math.floor(max_rejection * len(order) + 1e-9))
        return sum(means[-rejected:]) / rejected

    def orders(values):
        return [
            order
            for order in itertools.permutations(range(len(values)))
            if all(values[a] <= values[b] for a, b in itertools.pairwise(order))
        ]

    def mean(values):
        found = [area(order) for order in orders(values)]
        return sum(found) / len(found)

    best, random = mean([-q for q in quality]), sum(quality) / len(quality)
    return (mean(score) - random) / (best - random)


@pytest.mark.parametrize("max_rejection", [1.0, 0.5, 0.34, 0.01])
@pytest.mark.parametrize(
    ("score", "quality"),
    [
        ([0.1, 0.2, 0.3, 0.4, 0.5], [1.0, 1.0, 0.0, 1.0, 0.0]),
        ([0.1, 0.1, 0.3, 0.3, 0.3], [1.0, 0.0, 0.0, 1.0, 0.5]),
        ([5.0, 4.0, 3.0, 2.0, 1.0], [-1.0, 2.5, 0.0, 7.0, 3.0]),
        ([1.0, 1.0, 1.0], [0.0, 1.0, 2.0]),
    ],
)
def test_ratio_is_that_of_a_loop(score, quality, max_rejection):
    found = prediction_rejection_ratio(torch.tensor(score), torch.tensor(quality), max_rejection=max_rejection)
    if max_rejection * len(score) < 2:  # the mean of all answers alone, which no order changes
        assert math.isnan(found)
    else:
        assert found == pytest.approx(by_hand(score, quality, max_rejection), abs=1e-12)


def test_limits():
    quality = torch.rand(50, generator=torch.Generator().manual_seed(0))
    assert prediction_rejection_ratio(-quality, quality) == pytest.approx(1)
    assert prediction_rejection_ratio(quality, quality) < -0.9
    assert prediction_rejection_ratio(torch.zeros(50), quality) == pytest.approx(0, abs=1e-12)
    assert math.isnan(prediction_rejection_ratio(quality, torch.full((50,), 0.3)))
    assert math.isnan(prediction_rejection_ratio(torch.zeros(1), torch.zeros(1)))


def test_scale_and_order_of_the_data_change_nothing():
    generator = torch.Generator().manual_seed(1)
    score, quality = torch.randint(6, (40,), generator=generator).double(), torch.rand(40, generator=generator)
    found = prediction_rejection_ratio(score, quality)
    order = torch.randperm(40, generator=generator)
    assert prediction_rejection_ratio(score[order].exp(), 3 * quality[order] - 7) == pytest.approx(found, abs=1e-6)


def test_resamples_are_those_of_repeated_answers():
    generator = torch.Generator().manual_seed(2)
    score = torch.randint(5, (12,), generator=generator).double()
    quality = torch.randint(3, (12,), generator=generator).double()
    indices = torch.randint(12, (7, 12), generator=generator)
    counts = torch.stack([torch.bincount(row, minlength=12) for row in indices]).double()
    for max_rejection in (1.0, 0.5):
        expected = [
            prediction_rejection_ratio(score[row], quality[row], max_rejection=max_rejection) for row in indices
        ]
        found = weighted_rejection_ratio(score, quality, max_rejection=max_rejection)(counts)
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), equal_nan=True)


def test_the_interval_has_the_ratio_and_is_reproducible():
    generator = torch.Generator().manual_seed(3)
    quality = (torch.rand(80, generator=generator) > 0.4).double()
    score = torch.rand(80, generator=generator) - 0.5 * quality
    found = rejection_ratio_interval(score, quality, num_samples=200)
    assert found.low < found.value < found.high <= 1
    assert found.low > 0
    state = torch.get_rng_state()
    assert rejection_ratio_interval(score, quality, num_samples=200) == found
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("score", "quality", "options", "said"),
    [
        ([0.1], [0.1, 0.2], {}, r"found \[1\] and \[2\]"),
        ([], [], {}, r"found \[0\] and \[0\]"),
        ([math.nan, 1.0], [0.0, 1.0], {}, "must not be NaN"),
        ([0.0, 1.0], [math.inf, 1.0], {}, "must be finite"),
        ([0.0, 1.0], [0.0, 1.0], {"max_rejection": 0.0}, r"max_rejection must lie in \(0, 1\]"),
    ],
)
def test_malformed_input_is_refused(score, quality, options, said):
    with pytest.raises(ValueError, match=said):
        prediction_rejection_ratio(torch.tensor(score), torch.tensor(quality), **options)
