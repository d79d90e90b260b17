"""Accuracy that is no better than chance is said, for any number of classes, imbalance and size."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch

from bmoe_lightning.metrics.chance import chance, chance_accuracy, chance_warning, upper_tail


def answers(right, count, num_classes=4, target=None):
    """Logits of a model that answers the first questions correctly, and the labels, evenly distributed by default."""
    target = torch.arange(count) % num_classes if target is None else target
    chosen = torch.where(torch.arange(count) < right, target, (target + 1) % num_classes)
    return torch.nn.functional.one_hot(chosen, num_classes).double(), target


def test_chance_counts_present_classes():
    log_probs = torch.zeros(2, 4)
    log_probs[1, 2:] = -torch.inf
    assert chance_accuracy(log_probs) == pytest.approx((1 / 4 + 1 / 2) / 2)


@pytest.mark.parametrize(("trials", "probability"), [(1, 0.3), (5, 0.5), (8, 0.01), (9, 0.99)])
def test_the_tail_is_the_sum_over_all_outcomes(trials, probability):
    for successes in range(trials + 2):
        expected = sum(
            math.prod(probability if hit else 1 - probability for hit in outcome)
            for outcome in product((0, 1), repeat=trials)
            if sum(outcome) >= successes
        )
        assert upper_tail(successes, trials, probability) == pytest.approx(expected, abs=1e-12)


def test_the_tail_at_its_ends():
    assert upper_tail(0, 10, 0.2) == 1
    assert upper_tail(3, 10, 1.0) == 1
    assert upper_tail(3, 10, 0.0) == 0
    assert upper_tail(100_000, 400_000, 0.25) == pytest.approx(0.5, abs=2e-3)


@pytest.mark.parametrize(
    ("right", "count", "warned"),
    # P(X >= 33 | 100, 1/4) = .0446 and P(X >= 32) = .0693; P(X >= 3 | 4) = .0508, P(X >= 4 | 4) = .0039.
    [(20, 100, True), (32, 100, True), (33, 100, False), (60, 100, False), (3, 4, True), (4, 4, False), (1, 1, True)],
)
def test_the_limit_is_that_of_the_binomial_test(right, count, warned):
    sentence = chance_warning(*answers(right, count))
    assert (sentence is not None) == warned
    if warned:
        assert (
            f"accuracy of {right / count:.3f} on {count} labels is not above chance (0.250; one-sided bin" in sentence
        )


def test_nothing_is_said_without_labels():
    assert chance_warning(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)) is None


class TestImbalance:
    LABELS = (torch.arange(200) % 10 >= 8).long() * (1 + torch.arange(200) % 2)  # 80 % of class 0

    def test_the_most_common_class_is_not_better_than_itself(self):
        always = torch.tensor([1.0, 0, 0, 0]).expand(200, 4)
        sentence = chance_warning(always, self.LABELS)
        assert "accuracy of 0.800 on 200 labels is not above that of always the most common class (0.800" in sentence
        assert chance(always, self.LABELS).most_common

    @pytest.mark.parametrize(("right", "warned"), [(140, True), (168, True), (171, False), (195, False)])
    def test_a_model_must_be_better(self, right, warned):
        # P(X >= 170 | 200, .8) = .0430
        logits, labels = answers(right, 200, target=self.LABELS)
        assert (chance_warning(logits, labels) is not None) == warned

    @pytest.mark.parametrize("seed", range(4))
    def test_a_few_even_labels_are_no_imbalance(self, seed):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(4, (20,), generator=generator)
        assert float(torch.bincount(labels).max()) / 20 > 0.25
        assert not chance(torch.zeros(20, 4), labels).most_common
        assert chance_warning(*answers(11, 20, target=labels)) is None


class TestDifferentNumbersOfClasses:
    def ragged(self, count):
        logits = torch.zeros(count, 8, dtype=torch.float64)
        logits[::2, 2:] = -torch.inf  # two classes, then eight
        return logits

    def test_chance_is_the_mean(self):
        assert chance_accuracy(self.ragged(100)) == pytest.approx((0.5 + 0.125) / 2)

    def test_a_class_that_every_question_has_is_not_common(self):
        """Class 0 is right for .5 of half of the questions and .125 of the others."""
        generator = torch.Generator().manual_seed(0)
        logits = self.ragged(400)
        labels = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
        assert float(torch.bincount(labels).max()) / 400 > 0.28
        assert not chance(logits, labels).most_common

    def test_the_error_rate_is_at_most_the_level(self):
        generator = torch.Generator().manual_seed(1)
        logits = self.ragged(60)
        unwarned = 0
        for _ in range(400):
            labels = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
            guesses = torch.where(
                logits.isfinite(), torch.rand(60, 8, generator=generator, dtype=torch.float64), logits
            )
            unwarned += chance_warning(guesses, labels) is None
        assert unwarned <= 0.05 * 400 + 2 * math.sqrt(0.05 * 0.95 * 400)


def test_models_that_guess_are_warned_of_at_the_stated_rate():
    generator = torch.Generator().manual_seed(0)
    found = [
        chance_warning(torch.randn(200, 4, generator=generator), torch.randint(4, (200,), generator=generator))
        for _ in range(400)
    ]
    assert sum(sentence is None for sentence in found) <= 0.05 * 400 + 2 * math.sqrt(0.05 * 0.95 * 400)
