"""Examples of two sets are paired whatever their order, and those without a partner are counted."""

from __future__ import annotations

import pytest
import torch

from bmoe_lightning.experts import row_matching
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


class TestLimit:
    """The work and the memory are limited whatever the number of examples, and it is said where that does not do."""

    def test_beyond_it_nothing_is_claimed(self, monkeypatch):
        known, labels = points(3000, 4)
        same, same_labels = in_another_order(known, labels, 0.05)
        others = points(3000, 4, seed=2)[0]
        for found, its_labels in ((same, same_labels), (others, labels)):
            enough = found_pairs(known, found, labels, its_labels)
            assert enough.is_complete
            monkeypatch.setattr(row_matching, "MAX_WORK", 1 << 21)
            assert not found_pairs(known, found, labels, its_labels).is_complete
            monkeypatch.undo()

    def test_distances_are_within_it(self, monkeypatch):
        cells, orig = [], torch.cdist
        monkeypatch.setattr(torch, "cdist", lambda x, y, p: cells.append(len(x) * len(y)) or orig(x, y, p=p))
        monkeypatch.setattr(row_matching, "MAX_WORK", 1 << 25)
        monkeypatch.setattr(row_matching, "_CELLS", 1 << 16)
        known, labels = points(20_000, 4)
        assert not found_pairs(known, points(20_000, 4, seed=2)[0], labels, labels).is_complete
        assert 0 < 4 * sum(cells) <= 1 << 25
        assert max(cells) <= 1 << 16

    def test_pieces_of_a_neighbourhood_are_the_whole(self, monkeypatch):
        known, labels = points(2000, 4)
        found, its_labels = in_another_order(known, labels, 0.05)
        found[:100] = points(100, 4, seed=2)[0]
        expected = found_pairs(known, found, labels, its_labels)
        monkeypatch.setattr(row_matching, "_CELLS", 256 * 16)
        assert found_pairs(known, found, labels, its_labels) == expected

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["another order", "others"])
    def test_a_million_examples(self, kind):
        known, labels = points(1_000_000, 4)
        found, its_labels = in_another_order(known, labels, 1e-7)
        if kind == "others":
            found = points(1_000_000, 4, seed=2)[0]
        pairing = found_pairs(known, found, labels, its_labels)
        assert pairing.is_complete == (kind == "another order")
        if pairing.is_complete:
            assert pairing == Pairing(0, 0, is_exact=True)
