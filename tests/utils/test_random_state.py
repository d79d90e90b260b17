"""A loader's order can be had again in any process, and looking at it changes nothing."""

from __future__ import annotations

import pytest
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from plain_runs import COUNTING, SHUFFLING, loader, values
from torch.utils.data import DataLoader, SubsetRandomSampler

from bmoe_lightning.utils.random_state import forked_random_state, reproducible_order, unchanged_random_state


def test_forked_random_state():
    before = torch.get_rng_state()
    with forked_random_state():
        torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)


def test_generator_of_a_wrapped_sampler():
    generator = torch.Generator().manual_seed(1)
    sampler = SubsetRandomSampler(range(5), generator=generator)
    data = DataLoader(range(5), sampler=DistributedSamplerWrapper(sampler, num_replicas=2, rank=0, shuffle=False))
    before = generator.get_state()
    with unchanged_random_state(data, [sampler]):
        list(data)
        assert not torch.equal(generator.get_state(), before)
    assert torch.equal(generator.get_state(), before)
    with reproducible_order(data, [sampler]):
        first = list(data)
    generator.manual_seed(5)
    with reproducible_order(data, [sampler]):
        assert torch.equal(torch.cat(list(data)), torch.cat(first))


class TestReproducibleOrder:
    @pytest.mark.parametrize("kind", [*SHUFFLING, *COUNTING])
    def test_whatever_ran_before(self, kind):
        orders = []
        for seed in range(2):
            torch.manual_seed(seed)
            data = (SHUFFLING | COUNTING)[kind](torch.Generator().manual_seed(seed))
            for _ in range(seed):
                list(data)
            with reproducible_order(data):
                orders.append(values(data))
        assert orders[0] == orders[1]
        flat = [value for batch in orders[0] for value in batch]
        assert (flat == sorted(flat)) == (kind == "in order")

    @pytest.mark.parametrize("kind", [*SHUFFLING, *COUNTING])
    def test_what_follows_is_as_if_nothing_had_been(self, kind):
        follow = []
        for looks in (False, True):
            torch.manual_seed(1)
            data = (SHUFFLING | COUNTING)[kind](torch.Generator().manual_seed(1))
            list(data)
            if looks:
                with reproducible_order(data):
                    list(data)
            follow.append((values(data), torch.rand(1)))
        assert follow[0] == follow[1]

    def test_workers_that_stay(self):
        """They draw their seed once, before the first order."""
        generator = torch.Generator().manual_seed(1)
        data = loader(shuffle=True, generator=generator, num_workers=1, persistent_workers=True)
        orders = []
        for _ in range(2):
            with reproducible_order(data):
                orders.append(values(data))
        assert orders[0] == orders[1]

    def test_plain_batches(self):
        batches = [[torch.ones(1)]]
        with reproducible_order(batches):
            assert values(batches) == [[1.0]]
