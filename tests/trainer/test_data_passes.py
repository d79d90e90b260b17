"""Passes over a trainer's data: the same batches, and nothing else changed by looking at them."""

from __future__ import annotations

import types

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar, RichProgressBar, TQDMProgressBar
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    TensorDataset,
)
from toy import trainer

from bmoe_lightning.trainer.data_passes import (
    DataPass,
    best_weights,
    progress,
    reproducible_order,
    training_examples,
    training_pass,
    validation_pass,
)


class Plain(L.LightningModule):
    """A linear model that remembers the batches it was given."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.register_buffer("steps", torch.zeros(()))
        self.trained, self.validated = [], []

    def training_step(self, batch, batch_idx):
        self.trained.append(batch)
        self.steps += 1
        return self.layer(batch[0].to(self.layer.weight)).square().mean()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.validated.append(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


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


class AtTheEnd(L.Callback):
    """Calls a function when training ends, as `BayesianMoECallback` does its passes."""

    def __init__(self, function):
        self.function = function
        self.result = None

    def on_train_end(self, trainer, pl_module):
        self.result = self.function(trainer)


def numbers(size, start=0.0):
    return TensorDataset(torch.arange(start, start + size).unsqueeze(1))


def loader(size=20, start=0.0, **options):
    return DataLoader(numbers(size, start), **{"batch_size": 8, **options})


def at_the_end(folder, function, train=None, validation=None, module=None, **options):
    """What a function of the trainer says at the end of one epoch."""
    probe = AtTheEnd(function)
    run = trainer(folder, [probe], max_epochs=1, num_sanity_val_steps=0, **options)
    run.fit(module or Plain(), loader() if train is None else train, validation)
    return probe.result


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


SHUFFLING = {
    "no generator": lambda g: loader(shuffle=True),
    "loader": lambda g: loader(shuffle=True, generator=g),
    "in order": lambda g: loader(generator=g),
    "sampler": lambda g: loader(sampler=RandomSampler(numbers(20), generator=g)),
    "batch sampler": lambda g: DataLoader(
        numbers(20), batch_sampler=BatchSampler(RandomSampler(numbers(20), generator=g), 8, False)
    ),
}


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


class Epochs(Sampler):
    """Another order every epoch, of which it keeps count."""

    def __init__(self, size=20):
        self.size = size
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.epoch)
        self.epoch += 1
        return iter(torch.randperm(self.size, generator=generator).tolist())

    def __len__(self):
        return self.size


COUNTING = {
    "epochs": lambda g: loader(sampler=Epochs()),
    "epochs of a batch sampler": lambda g: DataLoader(numbers(20), batch_sampler=BatchSampler(Epochs(), 8, False)),
    "distributed": lambda g: loader(sampler=DistributedSampler(numbers(20), 2, 1, shuffle=True)),
}


def values(batches):
    return [batch[0].flatten().tolist() for batch in batches]


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

    def test_when_training_ends_and_in_another_process(self, tmp_path):
        data = loader(shuffle=True)
        found = at_the_end(tmp_path, lambda t: values(training_pass(t, "x")), data)
        torch.manual_seed(123)
        fresh = loader(shuffle=True)
        with reproducible_order(fresh):
            assert values(fresh) == found

    def test_plain_batches(self):
        batches = [[torch.ones(1)]]
        with reproducible_order(batches):
            assert values(batches) == [[1.0]]

    def test_evaluation_sees_the_order_of_its_loop(self, tmp_path):
        """A sampler's epoch, for one, is that of the trainer's loop."""
        sampler = Epochs()
        sampler.set_epoch(5)
        data = loader(sampler=sampler)
        found = at_the_end(tmp_path, lambda t: values(DataPass(t, data, 3, "x", repeats=True)))
        sampler.set_epoch(5)
        assert found == values(data)


class TestProgress:
    def fake(self, bar, **options):
        return types.SimpleNamespace(progress_bar_callback=bar, is_global_zero=True, **options)

    def test_rich_task_is_done_at_the_end(self, tmp_path, capsys):
        bar = RichProgressBar()

        def look(t):
            steps = []
            for _ in training_pass(t, "Looking around"):
                steps.append(bar.progress.tasks[-1].completed)
            return steps, bar.progress.tasks[-1]

        probe = AtTheEnd(look)
        trainer(tmp_path, [probe, bar], max_epochs=1, enable_progress_bar=True).fit(Plain(), loader())
        steps, task = probe.result
        assert steps == [0, 1, 2]
        assert (task.description, task.total, task.completed) == ("Looking around", 3, 3)

    def test_tqdm_counts_to_the_end(self, capsys):
        with progress(self.fake(TQDMProgressBar()), 3, "Looking around") as advance:
            for _ in range(3):
                advance()
        shown = "".join(capsys.readouterr())
        assert "Looking around" in shown
        assert "3/3" in shown

    @pytest.mark.parametrize(
        "case", ["no bar", "disabled rich", "disabled tqdm", "rich before it began", "a bar of one's own", "other rank"]
    )
    def test_silent(self, case, capsys):
        bars = {"no bar": None, "disabled rich": RichProgressBar(), "disabled tqdm": TQDMProgressBar()}
        bars |= {"rich before it began": RichProgressBar(), "a bar of one's own": ProgressBar()}
        run = self.fake(bars.get(case, TQDMProgressBar()))
        if case.startswith("disabled"):
            run.progress_bar_callback.disable()
        if case == "other rank":
            run.is_global_zero = False
        with progress(run, 3, "Looking around") as advance:
            advance()
        assert "".join(capsys.readouterr()) == ""

    def test_pass_is_silent_without_a_bar(self, tmp_path, capsys):
        at_the_end(tmp_path, lambda t: capsys.readouterr() and list(training_pass(t, "Looking around")))
        assert "Looking around" not in "".join(capsys.readouterr())


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


class TestTrainingExamples:
    @pytest.mark.parametrize(
        ("data", "options", "expected"),
        [
            (loader(20), {}, 20),
            (loader(20, drop_last=True), {}, 16),
            (loader(20), {"limit_train_batches": 2}, 16),
            (loader(20), {"limit_train_batches": 0.5}, 8),
            (loader(20, sampler=SubsetRandomSampler(range(11))), {}, 11),
            (loader(20, sampler=RandomSampler(numbers(20), replacement=True, num_samples=50)), {}, 50),
            (DataLoader(Sized(), batch_size=8), {}, 20),
            (DataLoader(Stream(), batch_size=8), {"limit_train_batches": 3}, 24),
            (DataLoader(numbers(20), batch_sampler=BatchSampler(range(20), 6, False)), {}, 20),
            (
                DataLoader(numbers(20), batch_sampler=BatchSampler(range(20), 6, False)),
                {"limit_train_batches": 2},
                12,
            ),
            (DataLoader(numbers(20), batch_sampler=BatchSampler(range(20), 6, True)), {}, 18),
            (DataLoader(numbers(5), batch_sampler=[[0, 1], [4, 2, 3]]), {}, None),
            (DataLoader(ReadyBatches(), batch_size=None), {}, None),
        ],
        ids=lambda value: "",
    )
    def test_of_one_epoch(self, tmp_path, data, options, expected):
        assert at_the_end(tmp_path, training_examples, data, **options) == expected

    def test_of_a_pass_are_those_of_its_batches(self):
        alone = types.SimpleNamespace(world_size=1)
        assert [DataPass(alone, loader(20), n, "x").num_examples for n in (1, 2, 3)] == [8, 16, 20]
        assert DataPass(alone, [1, 2], 2, "x").num_examples is None

    def test_are_not_known_without_an_end_or_a_loader(self):
        for data, count in ((DataLoader(Stream(), batch_size=8), torch.inf), ([1, 2], 2)):
            fake = types.SimpleNamespace(world_size=1, train_dataloader=data, num_training_batches=count)
            assert training_examples(fake) is None

    def test_are_those_of_all_processes_without_repeats(self):
        data = numbers(21)
        train = DataLoader(data, 4, sampler=DistributedSampler(data, 2, 1), drop_last=True)
        several = {"world_size": 2, "global_rank": 1, "train_dataloader": train, "strategy": None}
        assert training_examples(types.SimpleNamespace(**several, num_training_batches=2)) == 16
        train = DataLoader(data, 4, sampler=DistributedSampler(data, 2, 1))
        assert (
            training_examples(types.SimpleNamespace(**several | {"train_dataloader": train}, num_training_batches=3))
            == 21
        )
        assert DataPass(types.SimpleNamespace(**several), train, 1, "x").num_examples == 8


class TestLoaders:
    @pytest.mark.parametrize("several", [dict, list])
    def test_several_training_loaders_are_refused(self, several):
        both = {"a": loader(), "b": loader()} if several is dict else [loader(), loader()]
        fake = types.SimpleNamespace(train_dataloader=both, num_training_batches=3)
        with pytest.raises(RuntimeError, match=f"one training loader, found {several.__name__}"):
            training_pass(fake, "x")

    def test_no_training_loader_is_refused(self):
        with pytest.raises(RuntimeError, match="found NoneType"):
            training_pass(types.SimpleNamespace(train_dataloader=None), "x")

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


class TestBestWeights:
    def fake(self, path):
        return types.SimpleNamespace(checkpoint_callback=types.SimpleNamespace(best_model_path=str(path)))

    def checkpoint(self, path, **state):
        torch.save({"state_dict": {name: torch.tensor(value) for name, value in state.items()}}, path)
        return self.fake(path)

    @pytest.mark.parametrize("fails", [False, True])
    def test_are_there_for_a_while(self, tmp_path, fails):
        module = Plain()
        last = {name: value.clone() for name, value in module.state_dict().items()}
        parameters = list(module.parameters())
        state = {"layer.weight": [[3.0]], "layer.bias": [4.0], "steps": 5.0}
        run = self.checkpoint(tmp_path / "best.ckpt", **state)

        def use():
            with best_weights(run, module):
                assert {name: value.tolist() for name, value in module.state_dict().items()} == state
                if fails:
                    raise KeyError("in between")

        if fails:
            with pytest.raises(KeyError):
                use()
        else:
            use()
        for name, value in module.state_dict().items():
            assert torch.equal(value, last[name])
        assert all(one is other for one, other in zip(parameters, module.parameters(), strict=True))

    def test_a_checkpoint_of_a_part_changes_a_part(self, tmp_path):
        module = Plain()
        bias = module.layer.bias.clone()
        with best_weights(self.checkpoint(tmp_path / "best.ckpt", **{"layer.weight": [[3.0]]}), module):
            assert module.layer.weight.item() == 3
            assert torch.equal(module.layer.bias, bias)

    def test_a_checkpoint_that_does_not_fit_changes_nothing(self, tmp_path):
        module = Plain()
        last = {name: value.clone() for name, value in module.state_dict().items()}
        run = self.checkpoint(tmp_path / "best.ckpt", **{"layer.weight": [[3.0]], "layer.bias": [4.0, 5.0]})
        with pytest.raises(RuntimeError, match="size mismatch"), best_weights(run, module):
            pass
        for name, value in module.state_dict().items():
            assert torch.equal(value, last[name])

    @pytest.mark.parametrize("callback", [None, ModelCheckpoint()])
    def test_without_a_saved_checkpoint(self, callback):
        run = types.SimpleNamespace(checkpoint_callback=callback)
        with pytest.raises(RuntimeError, match="saved no checkpoint"), best_weights(run, Plain()):
            pass
