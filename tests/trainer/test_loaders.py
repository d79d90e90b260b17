"""What is read off a loader, and that the loader gives the same afterwards."""

from __future__ import annotations

import io
import itertools
import random

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import (
    BatchSampler,
    ChainDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
)

from bmoe_lightning.trainer.loaders import (
    JoinedLoaders,
    count_batches,
    count_entries,
    first_batch,
    iterates_once,
)


class Noisy(Dataset):
    """Draws from every random state there is, and counts what it is asked for."""

    def __init__(self):
        self.own = np.random.default_rng(0)
        self.torch = torch.Generator().manual_seed(0)
        self.python = random.Random(0)
        self.asked = 0

    def __len__(self):
        return 12

    def __getitem__(self, index):
        self.asked += 1
        drawn = [self.own.random(), float(torch.rand((), generator=self.torch)), self.python.random()]
        drawn += [random.random(), np.random.rand(), float(torch.rand(()))]
        return torch.tensor([index + 1000 * self.asked, *drawn], dtype=torch.float64)


class Shuffled(Sampler):
    """Shuffles its own list in place, with Python's random state, and counts epochs."""

    def __init__(self, size=12):
        self.order = list(range(size))
        self.epoch = 0

    def __iter__(self):
        self.epoch += 1
        random.shuffle(self.order)
        return iter(self.order)

    def __len__(self):
        return len(self.order)


class OwnStream(IterableDataset):
    """Starts again, from a state of its own."""

    def __init__(self):
        self.passes = 0

    def __iter__(self):
        self.passes += 1
        yield from torch.arange(10) + 100 * self.passes


class Claims(IterableDataset):
    """Says that it has 40 entries, and has 12."""

    def __len__(self):
        return 40

    def __iter__(self):
        yield from torch.arange(12)


class Lazy(Sampler):
    """Gives iterators of entries, as torch's loaders accept."""

    def __iter__(self):
        yield from (iter([0]), map(int, "123"), iter([4]))


class Pairs(DataLoader):
    """Joins two batches of its sampler, and says the number of those."""

    def __iter__(self):
        batches = super().__iter__()
        return (torch.cat(both) for both in zip(batches, batches, strict=True))


class Promises:
    """Says that it has 40 batches, and has 5."""

    def __len__(self):
        return 40

    def __iter__(self):
        return iter([torch.arange(2)] * 5)


class Promised(Sampler):
    """Says that it gives 9 entries, and gives 3."""

    def __iter__(self):
        return iter(range(3))

    def __len__(self):
        return 9


class Uneven(BatchSampler):
    def __iter__(self):
        yield from ([0], [1, 2, 3, 4], [5], [6, 7, 8, 9])

    def __len__(self):
        return 4


LOADERS = {
    "in order": lambda: DataLoader(Noisy(), 4),
    "shuffled": lambda: DataLoader(Noisy(), 4, shuffle=True),
    "a generator of its own": lambda: DataLoader(Noisy(), 4, shuffle=True, generator=torch.Generator().manual_seed(1)),
    "a sampler with a state": lambda: DataLoader(Noisy(), 4, sampler=Shuffled()),
    "a batch sampler": lambda: DataLoader(Noisy(), batch_sampler=BatchSampler(Shuffled(), 5, False)),
    "a subset": lambda: DataLoader(Subset(Noisy(), [7, 3, 5]), 2),
    "no batches": lambda: DataLoader(Noisy(), batch_size=None),
    "a stream": lambda: DataLoader(OwnStream(), 4),
    "a list": lambda: [torch.arange(2), torch.arange(3)],
}


def seeded(make):
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    return make()


@pytest.mark.parametrize("name", LOADERS)
def test_the_first_batch_is_that_of_training_and_changes_nothing(name):
    expected = [list(data) for data in [seeded(LOADERS[name])] for _ in range(2)]
    loader = seeded(LOADERS[name])
    found = first_batch(loader)
    again = [list(loader) for _ in range(2)]
    assert all(torch.equal(a, b) for x, y in zip(again, expected, strict=True) for a, b in zip(x, y, strict=True))
    assert found.batch.shape == expected[0][0].shape
    if name in ("in order", "a subset", "a list", "a stream", "no batches"):
        # A pass draws a base seed from torch's global random state first.
        assert torch.equal(found.batch[..., :6], expected[0][0][..., :6])


def test_a_batch_from_a_worker_process():
    loader = seeded(lambda: DataLoader(Noisy(), 4, num_workers=1, persistent_workers=True))
    found = first_batch(loader)
    assert found.entries == 4
    assert found.batch[:, 0].tolist() == [1000, 2001, 3002, 4003]
    assert loader._iterator is None  # the loader's own workers are not started
    assert loader.dataset.asked == 0


@pytest.mark.parametrize(
    ("loader", "entries"),
    [
        (DataLoader(range(10), 4), 4),
        (DataLoader(range(3), 4), 3),
        (DataLoader(range(10), batch_sampler=Uneven(range(10), 1, False)), 1),
        (DataLoader(range(10), batch_size=None), None),
        (DataLoader(OwnStream(), 4), None),
    ],
)
def test_entries_of_the_first_batch(loader, entries):
    assert first_batch(loader).entries == entries


def test_no_first_batch_where_drawing_one_might_lose_it():
    stored = type("Stored", (IterableDataset,), {"__iter__": lambda self: iter(self.stored)})()
    stored.stored = (x for x in range(8))
    own = type("Own", (DataLoader,), {"__iter__": lambda self: iter([1])})(range(8))
    for loader in (iter([1, 2]), (x for x in [1]), DataLoader(stored, 2), own, [], DataLoader([])):
        assert first_batch(loader) is None
    assert list(stored.stored) == list(range(8))


@pytest.mark.parametrize(
    ("loader", "batches", "expected"),
    [
        (DataLoader(range(10), 4), 2, 8),
        (DataLoader(range(10), 4), 3, 10),
        (DataLoader(range(10), 4, drop_last=True), 2, 8),
        (DataLoader(range(10), batch_sampler=Uneven(range(10), 1, False)), 2, 5),
        (DataLoader(range(10), batch_sampler=Uneven(range(10), 1, False)), 4, 10),
        (DataLoader(range(9), batch_sampler=[[0], [1, 2, 3]]), 2, 4),
        (DataLoader(range(10), 4, sampler=RandomSampler(range(10), num_samples=25, replacement=True)), 7, 25),
        (DataLoader(range(12), 4, sampler=Shuffled()), 2, 8),
        (DataLoader(range(10), batch_size=None), 5, None),
        (DataLoader(range(10), batch_size=None, sampler=[[0], [1, 2, 3], [4]]), 2, 4),
        (DataLoader(range(10), batch_size=None, sampler=[3, 1]), 2, None),
        (DataLoader(range(10), batch_sampler=Lazy()), 2, 4),
        (Pairs(range(12), 2), 2, None),
        (DataLoader(OwnStream(), 4), 2, None),
        (DataLoader(range(10), 4), torch.inf, None),
        ([1, 2], 2, None),
    ],
    ids=lambda value: "",
)
def test_entries(loader, batches, expected):
    before = random.getstate()
    assert count_entries(loader, batches) == expected
    assert random.getstate() == before


def test_counting_leaves_a_sampler_as_it_was():
    sampler = Shuffled()
    count_entries(DataLoader(range(12), 4, sampler=sampler), 3)
    assert (sampler.epoch, sampler.order) == (0, list(range(12)))


@pytest.mark.parametrize(
    ("loader", "limit", "expected"),
    [
        (DataLoader(range(10), 4), 10, 3),
        ([1, 2, 3], 2, 2),
        (DataLoader(Claims(), 4), 10, 3),  # 12 entries, whatever it says
        (DataLoader(Claims(), 4), 2, 2),
        (DataLoader(range(10), batch_size=None), 20, 10),
        (DataLoader(range(10), batch_size=None, sampler=Promised()), 9, 3),
        (Pairs(range(12), 2), 6, 3),
        (Promises(), 40, 5),
        (Promises(), 4, 4),
        (range(7), 40, 7),
        (DataLoader(OwnStream(), 4), torch.inf, None),
    ],
)
def test_batches(loader, limit, expected):
    assert count_batches(loader, limit) == expected


class Itself(IterableDataset):
    def __init__(self):
        self.at = 0

    def __iter__(self):
        self.at = 0
        return self

    def __next__(self):
        self.at += 1
        if self.at > 3:
            raise StopIteration
        return self.at


class Continues(Itself):
    def __iter__(self):
        return self


class Reads(IterableDataset):
    def __init__(self, stored):
        self.stored = stored

    def __iter__(self):
        yield from self.stored


class Renews(Reads):
    def __iter__(self):
        self.stored = iter([1, 2])
        yield from self.stored


class Keeps(Reads):
    def __iter__(self):
        return self.stored


class ReadsInAMethod(Reads):
    def lines(self):
        return (line for line in self.stored)

    def __iter__(self):
        yield from self.lines()


class ReadsAProperty(Reads):
    @property
    def lines(self):
        return self.stored

    def __iter__(self):
        yield from self.lines


class RenewsInAMethod(ReadsInAMethod):
    def begin(self):
        self.stored = iter([1, 2])

    def __iter__(self):
        self.begin()
        yield from self.lines()


class Rewinds(Reads):
    def __iter__(self):
        self.stored.seek(0)
        yield from self.stored


class Several(Reads):
    def __iter__(self):
        for part in self.stored:
            yield from part


class Circular(Reads):
    def __init__(self):
        super().__init__(self)

    def __iter__(self):
        return iter([self.stored])


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (Continues(), True),
        (ReadsInAMethod(iter([1])), True),
        (ReadsAProperty(iter([1])), True),
        (RenewsInAMethod(iter([1])), False),
        (ReadsInAMethod([1]), False),
        (Rewinds(io.StringIO("1")), False),
        (Reads(io.StringIO("1")), True),
        (Reads(itertools.count()), False),
        (Several([Reads([1]), Reads(iter([1]))]), True),
        (Several([Reads([1]), [2]]), False),
        (Reads(Keeps(iter([1]))), True),
        (Reads(DataLoader(Keeps(iter([1])))), True),
        (Reads(DataLoader(Noisy())), False),
        (ChainDataset([Reads([1]), Reads(x for x in [1])]), True),
        (ChainDataset([Reads([1])]), False),
        (Circular(), False),
        (Reads(iter([1])), True),
        (Reads(x for x in [1]), True),
        (Keeps(iter([1])), True),
        (Keeps(map(str, [1])), True),
        (Itself(), False),
        (Renews(iter([1])), False),
        (Reads([1, 2]), False),
        (OwnStream(), False),
    ],
)
def test_streams_that_can_be_iterated_once(data, expected):
    assert iterates_once(DataLoader(data, 2)) == expected
    assert iterates_once(data) == expected


def test_other_iterables():
    assert all(map(iterates_once, (iter([1]), (x for x in [1]), map(str, [1]), zip([1], strict=True))))
    assert not any(map(iterates_once, ([1], (1,), range(3), DataLoader(range(3)), DataLoader(Noisy()), {1: 2})))


@pytest.mark.parametrize("mode", ["min_size", "max_size", "max_size_cycle"])
def test_loaders_that_are_drawn_from_together(mode):
    both = {"a": DataLoader(range(4), 2), "b": DataLoader(range(9), 3)}
    joined = JoinedLoaders(both, mode, [2, 2])
    combined = CombinedLoader(both, mode)
    combined.limits = [2, 2]
    expected = [batch for batch, _, _ in combined]
    for _ in range(2):
        assert str(list(joined)) == str(expected)
