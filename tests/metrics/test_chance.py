"""Accuracy that is no better than chance is said."""

from __future__ import annotations

import pytest
import torch

from bmoe_lightning.metrics.chance import chance_accuracy, chance_warning


def test_chance_counts_present_classes():
    log_probs = torch.zeros(2, 4)
    log_probs[1, 2:] = -torch.inf
    assert chance_accuracy(log_probs) == pytest.approx((1 / 4 + 1 / 2) / 2)


@pytest.mark.parametrize(("right", "warned"), [(20, True), (25, True), (32, True), (33, False), (60, False)])
def test_the_limit_is_the_one_sided_normal_quantile(right, warned):
    # .25 + 1.645 sqrt(.25 * .75 / 100) = .3212
    target = torch.zeros(100, dtype=torch.int64)
    logits = torch.zeros(100, 4)
    logits[:right, 0] = 1
    logits[right:, 1] = 1
    sentence = chance_warning(logits, target)
    assert (sentence is not None) == warned
    if warned:
        assert f"accuracy of {right / 100:.3f} on 100 items is not above chance (0.250)" in sentence


def test_many_random_models_are_mostly_warned_of():
    generator = torch.Generator().manual_seed(0)
    found = [
        chance_warning(torch.randn(200, 4, generator=generator), torch.randint(4, (200,), generator=generator))
        for _ in range(200)
    ]
    assert sum(sentence is not None for sentence in found) > 180
