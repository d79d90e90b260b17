"""Examples of two sets are paired whatever their order, and those without a partner are counted."""

from __future__ import annotations

import pytest
import torch

from bmoe_lightning.experts.row_matching import Pairing, paired


def points(size, num_classes, distinct=0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(distinct or size, num_classes, generator=generator, dtype=torch.float64)
    if distinct:
        found = found[torch.randint(distinct, (size,), generator=generator)]
    return found - found.mean(1, keepdim=True), torch.randint(num_classes, (size,), generator=generator)


def in_another_order(known, labels, noise):
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(len(known), generator=generator)
    moved = known[order] + noise * torch.randn(known.shape, generator=generator, dtype=torch.float64)
    return moved, labels[order].clone()


def found_pairs(known, found, labels, found_labels):
    spread = known.std(0).square().mean().sqrt()
    return paired(known, found, labels, found_labels, same_example=0.5 * spread, spread=spread)


@pytest.mark.parametrize("distinct", [0, 7], ids=["all differ", "seven values"])
@pytest.mark.parametrize("num_classes", [2, 4])
@pytest.mark.parametrize(("noise", "is_exact", "most"), [(0, True, 0), (1e-7, True, 0), (0.05, False, 0.01)])
@pytest.mark.parametrize("size", [30, 3000])
def test_the_same_examples(size, noise, is_exact, most, num_classes, distinct):
    known, labels = points(size, num_classes, distinct)
    moved, moved_labels = in_another_order(known, labels, noise)
    found = found_pairs(known, moved, labels, moved_labels)
    assert found.relabelled == 0
    assert found.is_exact == is_exact
    assert found.unpaired <= most * size


@pytest.mark.parametrize("noise", [0, 1e-7])
def test_two_labels_that_changed_places(noise):
    known, labels = points(400, 4)
    found, other_labels = in_another_order(known, labels, noise)
    one, other = (int((other_labels == label).nonzero()[0]) for label in (0, 1))
    other_labels[one], other_labels[other] = 1, 0
    assert found_pairs(known, found, labels, other_labels) == Pairing(2, 0, is_exact=True)


def test_rounding_hides_a_label_but_not_that_an_example_has_no_partner():
    known, labels = points(400, 4)
    found, other_labels = in_another_order(known, labels, 0.05)
    one, other = (int((other_labels == label).nonzero()[0]) for label in (0, 1))
    other_labels[one], other_labels[other] = 1, 0
    pairing = found_pairs(known, found, labels, other_labels)
    assert (pairing.relabelled, pairing.is_exact) == (0, False)
    assert 1 <= pairing.unpaired <= 2


@pytest.mark.parametrize("noise", [0, 0.05])
@pytest.mark.parametrize("count", [1, 10])
def test_examples_that_were_replaced(count, noise):
    known, labels = points(400, 4)
    found, other_labels = in_another_order(known, labels, noise)
    found[:count] = points(count, 4, seed=2)[0]
    assert found_pairs(known, found, labels, other_labels).unpaired == count


def test_equal_labels_of_equal_examples_have_no_order():
    known = torch.ones(6, 3, dtype=torch.float64)
    known[3:] = torch.tensor([2.0, 0, -1], dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    assert found_pairs(known, known, labels, torch.tensor([2, 0, 1, 1, 2, 0])) == Pairing(0, 0, is_exact=True)


def test_pairs_are_nearest_first():
    """A brute-force search over all pairs of one label finds the same number without a partner."""
    known, labels = points(60, 3)
    found, other_labels = points(60, 3, seed=4)[0], labels
    spread = known.std(0).square().mean().sqrt()
    distances = torch.cdist(known, found, p=torch.inf)
    distances[labels.unsqueeze(1) != other_labels] = torch.inf
    left = 0
    while float(distances.min()) <= 0.5 * spread:
        row, column = divmod(int(distances.argmin()), 60)
        distances[row], distances[:, column] = torch.inf, torch.inf
        left += 1
    assert found_pairs(known, found, labels, other_labels).unpaired == pytest.approx(60 - left, abs=3)
