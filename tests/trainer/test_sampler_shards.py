"""A rank's shard of a loader, without processes: samplers can be told that there are some."""

from __future__ import annotations

import pytest
import torch
from fake_trainer import FakeTrainer
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset

from bmoe_lightning.trainer.checks import check_loaders
from bmoe_lightning.trainer.data_passes import DataPass
from bmoe_lightning.trainer.sampler_shards import check_order, find_sampler_shard


def fake_trainer(rank, world_size):
    return FakeTrainer(world_size=world_size, global_rank=rank)


def loader_of(rank, world_size, size=47, *, kind=DistributedSampler, batch_size=8, drop_last=False, **options):
    data = list(range(size))
    sampler = kind(data, num_replicas=world_size, rank=rank, **options)
    return DataLoader(data, batch_size=batch_size, sampler=sampler, drop_last=drop_last)


def seen(loader, num_batches=None):
    batches = list(loader)[:num_batches]
    return torch.cat(batches).tolist() if batches else []


def shards(world_size, num_batches=float("inf"), **options):
    loaders = [loader_of(rank, world_size, **options) for rank in range(world_size)]
    found = [find_sampler_shard(fake_trainer(r, world_size), x, num_batches) for r, x in enumerate(loaders)]
    return list(zip(loaders, found, strict=True))


class Pairs(DataLoader):
    """Joins two batches of its sampler."""

    def __iter__(self):
        batches = list(super().__iter__())
        return (torch.cat(batches[at : at + 2]) for at in range(0, len(batches), 2))


def test_a_part_of_a_loader_that_iterates_itself_is_refused():
    data = list(range(42))
    loader = Pairs(data, 4, sampler=DistributedSampler(data, 2, 0))
    run = fake_trainer(0, 2)
    shard = find_sampler_shard(run, loader, len(loader))
    with shard.without_repeats():
        assert len(seen(loader)) == 21
    with pytest.raises(ValueError, match=r"Pairs has an __iter__ of its own, .* the first 2 batches"):
        find_sampler_shard(run, loader, 2)
    assert find_sampler_shard(fake_trainer(0, 1), loader, 2) is None


@pytest.mark.parametrize("world_size", [2, 3, 5])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("size", [0, 1, 4, 30, 47])
class TestWithoutRepeats:
    def test_every_example_is_seen_once(self, world_size, shuffle, size):
        everything = []
        for loader, shard in shards(world_size, size=size, shuffle=shuffle):
            with shard.without_repeats():
                own = seen(loader)
            assert len(own) == shard.size
            everything += own
            assert shard.total == size
        assert sorted(everything) == list(range(size))

    def test_the_loader_repeats_examples_otherwise(self, world_size, shuffle, size):
        everything = []
        for loader, shard in shards(world_size, size=size, shuffle=shuffle):
            with shard.without_repeats():
                pass
            everything += seen(loader)
            assert len(seen(loader)) == shard.padded_size
        assert len(everything) == -(-size // world_size) * world_size

    def test_order_is_that_of_the_loop(self, world_size, shuffle, size):
        for loader, shard in shards(world_size, size=size, shuffle=shuffle):
            looped = seen(loader)
            with shard.without_repeats():
                assert seen(loader) == looped[: shard.size]


class TestLimits:
    @pytest.mark.parametrize("drop_last", [False, True])
    @pytest.mark.parametrize("num_batches", [0, 1, 2, 3, 10])
    def test_caps_are_of_each_process(self, num_batches, drop_last):
        # 47 on 2 processes are 24 and 23: exactly three batches, but for the example that is not repeated.
        everything = []
        for loader, shard in shards(2, num_batches, drop_last=drop_last):
            with shard.without_repeats():
                own = seen(loader, shard.num_batches)
            assert len(own) == shard.size
            assert len(own) == min(8 * num_batches, shard.size)
            everything += own
            assert loader.drop_last == loader.batch_sampler.drop_last == drop_last
        assert len(everything) == len(set(everything)) == shard.total == min(16 * num_batches, 47)

    def test_the_loader_is_put_back_after_an_error(self):
        ((loader, shard), _) = shards(2)
        with pytest.raises(KeyError), shard.without_repeats():
            raise KeyError
        assert loader.batch_sampler.sampler is shard.sampler

    def test_samplers_that_drop_or_never_repeat(self):
        for _, shard in shards(2, kind=UnrepeatedDistributedSampler, shuffle=False):
            assert shard.size == shard.padded_size
        assert [shard.size for _, shard in shards(2, drop_last=False)] == [24, 23]
        dropping = [DistributedSampler(range(47), 2, rank, drop_last=True) for rank in (0, 1)]
        found = [
            find_sampler_shard(fake_trainer(r, 2), DataLoader(range(47), 4, sampler=s), 99)
            for r, s in enumerate(dropping)
        ]
        assert [shard.size for shard in found] == [23, 23]

    def test_the_user_s_own_order_is_kept(self):
        order = [5, 3, 4, 0, 1]
        everything = []
        for rank in range(2):
            sampler = DistributedSamplerWrapper(order, num_replicas=2, rank=rank, shuffle=False)
            loader = DataLoader(range(10), batch_size=2, sampler=sampler)
            shard = find_sampler_shard(fake_trainer(rank, 2), loader, 9)
            check_order(shard)
            with shard.without_repeats():
                everything.append(seen(loader))
        assert everything == [[5, 4, 1], [3, 0]]


class TestGather:
    def test_with_one_process_it_only_cuts(self):
        (_, (_, shard)) = shards(2)
        assert shard.gather(torch.arange(24)).tolist() == list(range(23))

    def test_examples_that_are_no_entries_are_refused(self):
        (_, (_, shard)) = shards(2)
        with pytest.raises(ValueError, match="46 examples for 24 entries"):
            shard.gather(torch.arange(46))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(5))


class Own(DistributedSampler):
    """Might repeat anything anywhere."""


class OwnBatches(BatchSampler):
    """Might group anything."""


class TestRefusals:
    @pytest.mark.parametrize(
        "loader",
        [
            [torch.zeros(2)],
            DataLoader(Stream()),
            DataLoader(range(5)),
            DataLoader(range(5), batch_size=None),
            DataLoader(range(5), sampler=Own(range(5), 2, 0)),
            DataLoader(range(5), batch_sampler=OwnBatches(DistributedSampler(range(5), 2, 0), 2, False)),
            DataLoader(range(5), sampler=DistributedSampler(range(5), 2, 1)),
            DataLoader(range(5), sampler=DistributedSampler(range(5), 4, 0)),
        ],
        ids=["list", "stream", "not-distributed", "no-batches", "own", "own-batches", "other-rank", "other-size"],
    )
    def test_loaders_of_which_nothing_is_known(self, loader):
        trainer = fake_trainer(0, 2)
        with pytest.raises(ValueError, match="use_distributed_sampler"):
            check_loaders(trainer, [loader])
        with pytest.raises(ValueError, match="counted once"):
            DataPass(trainer, loader, 2, "x")
        DataPass(trainer, loader, 2, "x", repeats=True)
        check_loaders(fake_trainer(0, 1), [loader])


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(("size", "batch_size"), [(47, 8), (9, 4), (2, 1), (41, 8)])
@pytest.mark.parametrize("world_size", [2, 3])
def test_lockstep_batches_count_every_example_once(world_size, size, batch_size, drop_last):
    """All processes have as many batches of the same sizes, and the counted examples are those of a shard."""
    seen, sizes = [], []
    for rank in range(world_size):
        loader = loader_of(rank, world_size, size, batch_size=batch_size, shuffle=False, drop_last=drop_last)
        shard = find_sampler_shard(fake_trainer(rank, world_size), loader, len(loader))
        batches = [shard.counted(position, batch) for position, batch in enumerate(loader)]
        assert [batch.size for batch in batches] == [len(batch.batch) for batch in batches]
        sizes.append([batch.size for batch in batches])
        own = [index for batch in batches for index in batch.batch[: batch.num_counted].tolist()]
        assert len(own) == shard.size
        seen += own
    assert all(found == sizes[0] for found in sizes)
    assert len(seen) == len(set(seen)) == shard.total
    if not drop_last:
        assert sorted(seen) == list(range(size))
