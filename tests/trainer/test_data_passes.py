"""Passes over a trainer's data: the same batches, and nothing else changed by looking at them."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from fake_trainer import FakeTrainer
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from plain_runs import SHUFFLING, AtTheEnd, Epochs, Plain, at_the_end, loader, numbers, values
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
)
from toy import trainer

from bmoe_lightning.trainer.data_passes import (
    DataPass,
    TrainerTrainingData,
    training_pass,
    validation_pass,
)
from bmoe_lightning.utils.random_state import reproducible_order


class Pairs(DataLoader):
    """Joins two batches of its sampler, and says the number of those."""

    def __iter__(self):
        batches = super().__iter__()
        return ([torch.cat([one[0], other[0]])] for one, other in zip(batches, batches, strict=True))


class Promises:
    """Says that it has 40 batches, and has 5."""

    def __len__(self):
        return 40

    def __iter__(self):
        return ([torch.ones(2, 1)] for _ in range(5))


class Hooked(Plain):
    """Has all three transfer hooks of its own, in an order that shows."""

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return [x + 1 for x in batch]

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return [x * 10 for x in batch]

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [x - 3 for x in batch]


class Stream(IterableDataset):
    """Counts from 0, without an end, and remembers how far."""

    def __init__(self):
        self.last = -1

    def __iter__(self):
        while True:
            self.last += 1
            yield torch.tensor([float(self.last)])


def assert_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one[0].dtype == other[0].dtype
        assert torch.equal(one[0], other[0])


class TestBatches:
    @pytest.mark.parametrize("module", [Plain, Hooked])
    @pytest.mark.parametrize("options", [{}, {"precision": "64-true"}, {"limit_train_batches": 2}])
    def test_training_pass_sees_what_the_training_saw(self, tmp_path, module, options):
        own = module()
        found = at_the_end(tmp_path, lambda t: list(training_pass(t, "x")), module=own, **options)
        assert_same(found, own.trained)

    @pytest.mark.parametrize("module", [Plain, Hooked])
    @pytest.mark.parametrize("options", [{}, {"precision": "64-true"}, {"limit_val_batches": 0.7}])
    def test_validation_pass_sees_what_the_validation_saw(self, tmp_path, module, options):
        own = module()
        validation = loader(30, 100.0)
        found = at_the_end(
            tmp_path, lambda t: list(validation_pass(t, "x")), validation=validation, module=own, **options
        )
        assert_same(found, own.validated)

    def test_hooks_of_a_datamodule(self, tmp_path):
        class Data(L.LightningDataModule):
            def train_dataloader(self):
                return loader()

            def on_after_batch_transfer(self, batch, dataloader_idx):
                return [-x for x in batch]

        module = Plain()
        probe = AtTheEnd(lambda t: list(training_pass(t, "x")))
        trainer(tmp_path, [probe], max_epochs=1).fit(module, datamodule=Data())
        assert_same(probe.result, module.trained)
        assert probe.result[0][0].max() == 0

    def test_a_hook_is_told_which_loader_it_is(self, tmp_path):
        class ByLoader(Plain):
            def on_after_batch_transfer(self, batch, dataloader_idx):
                return [x + 1000 * dataloader_idx for x in batch]

        found = at_the_end(tmp_path, lambda t: list(DataPass(t, loader(), 3, "x", dataloader_idx=1)), module=ByLoader())
        assert float(found[0][0][0]) == 1000

    def test_autocast_is_not_for_those_who_take_the_batches(self, tmp_path):
        def autocast(t):
            return [torch.is_autocast_enabled("cpu") for _ in training_pass(t, "x")]

        assert at_the_end(tmp_path, autocast, precision="bf16-mixed") == [False] * 3

    def test_length_and_limits(self, tmp_path):
        def lengths(t):
            passes = [training_pass(t, "x", cap) for cap in (None, 1, 3, 100)]
            return [(len(p), len(list(p))) for p in passes]

        assert at_the_end(tmp_path, lengths, loader(40)) == [(5, 5), (1, 1), (3, 3), (5, 5)]
        assert at_the_end(tmp_path, lengths, loader(40), limit_train_batches=2) == [(2, 2), (1, 1), (2, 2), (2, 2)]

    def test_no_batch_is_taken_that_is_not_used(self, tmp_path):
        stream = Stream()

        def take(t):
            before = stream.last
            batches = list(training_pass(t, "x", 3))
            return len(batches), stream.last - before

        options = {"limit_train_batches": 2}
        assert at_the_end(tmp_path, take, DataLoader(stream, batch_size=4), **options) == (2, 8)
        # A reader in front of the loader's end may be all that is left of a stream.
        assert at_the_end(tmp_path, lambda t: len(list(DataPass(t, iter([[1], [2]]), 2, "x")))) == 2

    def test_a_shuffling_loader_gives_the_same_order_every_time(self, tmp_path):
        def orders(t):
            own = training_pass(t, "x")
            return [[batch[0].flatten().tolist() for batch in own] for _ in range(2)]

        one, other = at_the_end(tmp_path, orders, loader(shuffle=True))
        assert one == other
        assert one != [batch[0].flatten().tolist() for batch in loader()]


def failing(batches):
    for _ in batches:
        torch.rand(1)
        raise KeyError("a broken batch")


class TestRandomState:
    @pytest.mark.parametrize("end", ["whole", "capped", "broken off", "exception", "closed"])
    @pytest.mark.parametrize("kind", SHUFFLING)
    def test_is_left_alone(self, tmp_path, kind, end):
        generator = torch.Generator().manual_seed(1)

        def look(t):
            before = torch.get_rng_state(), generator.get_state()
            own = DataPass(t, train, 2 if end == "capped" else 3, "x")
            if end in ("whole", "capped"):
                list(own)
            elif end == "broken off":
                for _ in own:
                    break
            elif end == "exception":
                with pytest.raises(KeyError):
                    failing(own)
            else:
                iterator = iter(own)
                next(iterator)
                iterator.close()
            return torch.equal(torch.get_rng_state(), before[0]), torch.equal(generator.get_state(), before[1])

        train = SHUFFLING[kind](generator)
        assert at_the_end(tmp_path, look, train) == (True, True)

    def test_what_the_consumer_draws_is_undone_too(self, tmp_path):
        def look(t):
            before = torch.get_rng_state()
            for _ in training_pass(t, "x"):
                torch.rand(3)
            return torch.equal(torch.get_rng_state(), before)

        assert at_the_end(tmp_path, look)

    def test_training_goes_on_as_if_no_pass_had_been(self, tmp_path):
        class EveryEpoch(L.Callback):
            def on_train_epoch_end(self, trainer, pl_module):
                list(training_pass(trainer, "x", 2))

        seen = []
        for callbacks in ([], [EveryEpoch()]):
            torch.manual_seed(3)
            module = Plain()
            trainer(tmp_path, callbacks, max_epochs=3).fit(module, loader(shuffle=True))
            seen.append(module.trained)
        assert_same(*seen)


class Sized(IterableDataset):
    def __iter__(self):
        return iter(torch.arange(20.0).unsqueeze(1))

    def __len__(self):
        return 20


class ReadyBatches(Dataset):
    """Items that are batches already."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        if index >= 3:
            raise IndexError
        return [torch.full((7, 1), float(index))]


class TestOrder:
    def test_when_training_ends_and_in_another_process(self, tmp_path):
        data = loader(shuffle=True)
        found = at_the_end(tmp_path, lambda t: values(training_pass(t, "x")), data)
        torch.manual_seed(123)
        fresh = loader(shuffle=True)
        with reproducible_order(fresh):
            assert values(fresh) == found

    def test_evaluation_sees_the_order_of_its_loop(self, tmp_path):
        """A sampler's epoch, for one, is that of the trainer's loop."""
        sampler = Epochs()
        sampler.set_epoch(5)
        data = loader(sampler=sampler)
        found = at_the_end(tmp_path, lambda t: values(DataPass(t, data, 3, "x", repeats=True)))
        sampler.set_epoch(5)
        assert found == values(data)

    def test_a_sampler_that_lightning_wrapped(self, tmp_path):
        generator = torch.Generator().manual_seed(1)
        own = SubsetRandomSampler(range(20), generator=generator)
        data = loader(sampler=DistributedSamplerWrapper(own, num_replicas=1, rank=0, shuffle=False))

        def look(t):
            before = generator.get_state()
            orders = [values(DataPass(t, data, 3, "x")), values(DataPass(t, data, 3, "x"))]
            return orders[0] == orders[1], torch.equal(generator.get_state(), before)

        assert at_the_end(tmp_path, look) == (True, True)


class TestEntries:
    def test_of_a_pass_are_those_of_its_batches(self):
        alone = FakeTrainer(world_size=1)
        assert [DataPass(alone, loader(20), n, "x").num_entries for n in (1, 2, 3)] == [8, 16, 20]
        assert DataPass(alone, [1, 2], 2, "x").num_entries is None

    def test_are_those_of_all_processes_without_repeats(self):
        data = numbers(21)
        train = DataLoader(data, 4, sampler=DistributedSampler(data, 2, 1))
        several = {"world_size": 2, "global_rank": 1, "train_dataloader": train, "strategy": None}
        assert DataPass(FakeTrainer(**several), train, 1, "x").num_entries == 8


class TestTrainerTrainingData:
    @pytest.mark.parametrize(
        ("data", "options", "cap", "seen", "expected"),
        [
            (loader(20), {}, None, 20, 20),
            (loader(20), {}, 9, 20, 20),
            (loader(20), {}, 2, 16, 20),
            (loader(20), {}, 2, 48, 60),  # three examples an entry
            (loader(20, drop_last=True), {}, 1, 8, 16),
            (loader(20), {"limit_train_batches": 2}, 1, 8, 16),
            (loader(20), {"limit_train_batches": 0.7}, 1, 8, 16),
            (loader(20, sampler=SubsetRandomSampler(range(11))), {}, 1, 8, 11),
            (loader(20, sampler=RandomSampler(numbers(20), replacement=True, num_samples=50)), {}, 3, 24, 50),
            (DataLoader(numbers(20), batch_sampler=BatchSampler(range(20), 6, True)), {}, 1, 6, 18),
            (DataLoader(numbers(9), batch_sampler=[[0], [1, 2, 3], [4, 5], [6, 7, 8]]), {}, 2, 4, 9),
            (DataLoader(ReadyBatches(), batch_size=None), {}, 1, 5, 5 * len(ReadyBatches())),
            (DataLoader(Sized(), batch_size=8), {}, 1, 8, 24),  # a stream: by batches
            (DataLoader(numbers(9), None, sampler=[[0], [1, 2, 3], [4, 5], [6, 7, 8]]), {}, 2, 4, 9),
            (Pairs(numbers(24), 4), {}, 1, 8, 24),  # whatever its sampler says
            (Promises(), {}, 2, 4, 10),
            (DataLoader(Stream(), batch_size=8), {"limit_train_batches": 3}, 2, 16, 24),
            (DataLoader(Stream(), batch_size=8), {"max_steps": 2}, 2, 16, 16),  # no end: what was seen
        ],
        ids=lambda value: "",
    )
    def test_a_capped_pass_stands_for_the_epoch(self, tmp_path, data, options, cap, seen, expected):
        found = at_the_end(tmp_path, lambda t: TrainerTrainingData(t).num_examples(cap, seen), data, **options)
        assert found == expected

    @pytest.mark.parametrize(("cap", "batches"), [(None, 3), (2, 2), (9, 3)])
    def test_passes(self, tmp_path, cap, batches):
        assert at_the_end(tmp_path, lambda t: len(TrainerTrainingData(t).batches(cap))) == batches

    @pytest.mark.parametrize(("drop_last", "batches", "expected"), [(True, 2, 16), (False, 3, 21)])
    def test_several_processes_without_repeats(self, drop_last, batches, expected):
        data = numbers(21)
        train = DataLoader(data, 4, sampler=DistributedSampler(data, 2, 1), drop_last=drop_last)
        several = {"world_size": 2, "global_rank": 1, "train_dataloader": train, "strategy": None}
        fake = FakeTrainer(**several, num_training_batches=batches)
        assert TrainerTrainingData(fake).num_examples(1, 8) == expected


class TestLoaders:
    @pytest.mark.parametrize("several", [dict, list])
    def test_several_training_loaders_are_refused(self, several):
        both = {"a": loader(), "b": loader()} if several is dict else [loader(), loader()]
        fake = FakeTrainer(train_dataloader=both, num_training_batches=3)
        with pytest.raises(RuntimeError, match=f"one training loader, found {several.__name__}"):
            training_pass(fake, "x")

    def test_no_training_loader_is_refused(self):
        with pytest.raises(RuntimeError, match="found NoneType"):
            training_pass(FakeTrainer(train_dataloader=None), "x")

    def test_no_validation(self, tmp_path):
        def none(t):
            return validation_pass(t, "x") is None

        class Trains(Plain):
            validation_step = L.LightningModule.validation_step

        assert at_the_end(tmp_path, none)
        assert at_the_end(tmp_path, none, validation=loader(), limit_val_batches=0)
        assert at_the_end(tmp_path, none, validation=loader(), module=Trains())
        assert not at_the_end(tmp_path, none, validation=loader())

    def test_validation_that_training_never_reached(self, tmp_path):
        found = at_the_end(
            tmp_path, lambda t: list(validation_pass(t, "x")), validation=loader(), check_val_every_n_epoch=5
        )
        assert_same(found, list(loader()))

    def test_validation_without_an_end_is_refused(self, tmp_path):
        stream = DataLoader(Stream(), batch_size=4)
        with pytest.raises(RuntimeError, match="limit_val_batches"):
            at_the_end(
                tmp_path,
                lambda t: validation_pass(t, "x"),
                validation=stream,
                check_val_every_n_epoch=5,
            )
        found = at_the_end(
            tmp_path, lambda t: len(list(validation_pass(t, "x"))), validation=stream, limit_val_batches=2
        )
        assert found == 2
