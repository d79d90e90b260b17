"""Lightning's private attributes are there, and say what is expected, on a real Trainer."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSamplerWrapper
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, SubsetRandomSampler
from toy import ToyModule, loader, trainer

from bmoe_lightning.trainer import lightning_internals as internals
from bmoe_lightning.trainer.data_passes import as_list


class Probe(L.Callback):
    """Calls a function of the trainer in one of its hooks."""

    def __init__(self, hook, function):
        self.results = []
        setattr(self, hook, lambda trainer, *_: self.results.append(function(trainer)))


def probed(folder, hook, function, *, module=None, validation=None, ckpt_path=None, **options):
    probe = Probe(hook, function)
    run = trainer(folder, [probe], **{"max_epochs": 1, "num_sanity_val_steps": 0, **options})
    run.fit(ToyModule() if module is None else module, loader(32, 1), validation, ckpt_path=ckpt_path)
    return probe.results


class TwoOptimizers(ToyModule):
    """Steps two optimizers a batch, so that `global_step` counts twice."""

    automatic_optimization = False

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.parameters(), lr=0.1), torch.optim.SGD(self.parameters(), lr=0.1)]


def test_logged_step_counts_batches(tmp_path):
    assert probed(tmp_path, "on_train_end", internals.logged_step) == [2]
    both = probed(tmp_path, "on_train_end", lambda t: (internals.logged_step(t), t.global_step), module=TwoOptimizers())
    assert both == [(2, 4)]


def test_a_checkpoint_is_seen_while_it_is_restored(tmp_path):
    run = trainer(tmp_path, [], max_epochs=1)
    run.fit(ToyModule(), loader(32, 1))
    run.save_checkpoint(tmp_path / "last.ckpt")
    ask = internals.is_restoring_checkpoint
    options = {"max_epochs": 2, "ckpt_path": str(tmp_path / "last.ckpt")}
    assert probed(tmp_path, "on_fit_start", ask) == [False]
    assert probed(tmp_path, "on_fit_start", ask, **options) == [True]
    assert probed(tmp_path, "on_train_end", ask, **options) == [False]


def test_the_transfer_hook_is_found_where_the_user_wrote_it(tmp_path):
    class Hooked(ToyModule):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return batch if isinstance(batch, dict) else (batch, dataloader_idx)

    ask = lambda t: internals.before_batch_transfer(t.lightning_module, "batch", 3)  # noqa: E731
    assert probed(tmp_path, "on_train_end", ask, module=Hooked()) == [("batch", 3)]
    assert probed(tmp_path, "on_train_end", ask) == ["batch"]


def test_validation_loaders_are_there_before_the_first_validation(tmp_path):
    def ask(run):
        before = run.val_dataloaders
        internals.setup_validation_data(run)
        return before, run.val_dataloaders, run.num_val_batches

    validation = loader(20, 2)
    found = probed(tmp_path, "on_train_start", ask, validation=validation, check_val_every_n_epoch=5)
    assert found == [(None, validation, [2])]


@pytest.mark.parametrize("wrapper", [DistributedSamplerWrapper, UnrepeatedDistributedSamplerWrapper])
def test_the_wrapped_sampler(wrapper):
    own = SubsetRandomSampler(range(5))
    wrapped = wrapper(own, num_replicas=2, rank=0, shuffle=False)
    assert internals.wrapped_sampler(wrapped) is own
    for data in (
        DataLoader(range(5), sampler=wrapped),
        DataLoader(range(5), batch_sampler=BatchSampler(wrapped, 2, False)),
    ):
        assert internals.wrapped_samplers(data) == [own]


def test_other_loaders_have_no_wrapped_sampler():
    for data in ([1, 2], DataLoader(range(5)), DataLoader(range(5), sampler=DistributedSampler(range(5), 2, 0))):
        assert internals.wrapped_samplers(data) == []
    assert internals.wrapped_sampler(None) is None


def test_an_action_in_place_of_training(tmp_path):
    """Loaders, devices and strategy are those of a training; no step is made, and the loop is itself again."""
    module, seen = ToyModule(), []
    before = [parameter.clone() for parameter in module.parameters()]
    run = trainer(tmp_path, [], max_epochs=1)
    data = loader(32, 1)

    def action():
        seen.append((run.train_dataloader, run.num_training_batches, run.global_step, run.lightning_module))

    with internals.replaced_fit_loop(run, action):
        run.fit(module, data)
    assert seen == [(data, 2, 0, module)]
    assert all(torch.equal(one, other) for one, other in zip(module.parameters(), before, strict=True))
    assert "run" not in vars(run.fit_loop)
    run.fit(module, data)
    assert run.global_step == 2
    with pytest.raises(KeyError), internals.replaced_fit_loop(run, action):
        raise KeyError
    assert "run" not in vars(run.fit_loop)


def test_call_after_fit_loop(tmp_path):
    data, seen, callback = loader(32, 1), [], L.Callback()
    run = trainer(tmp_path, [callback], max_epochs=1)
    first = internals.call_after_fit_loop(run, callback, lambda: seen.append(("first", run.global_step, run.training)))
    second = internals.call_after_fit_loop(run, callback, lambda: seen.append(("second", run.train_dataloader)))
    taken_away = internals.call_after_fit_loop(run, L.Callback(), lambda: seen.append("in a trial run of a tuner"))
    run.fit(ToyModule(), data)
    assert seen == [("first", 2, True), ("second", data)]
    for undo in (first, second, taken_away, first):
        undo()
        assert "run" not in vars(run.fit_loop)
    with internals.replaced_fit_loop(run, lambda: None):
        replaced = run.fit_loop.run
        internals.call_after_fit_loop(run, callback, lambda: None)()
        assert run.fit_loop.run is replaced


class Batches:
    def __iter__(self):
        return iter(loader(8, 1))


@pytest.mark.parametrize(("data", "known"), [(loader(8, 1), True), (Batches(), False)])
def test_entries_of_predicted_batches_are_known_of_a_data_loader(tmp_path, data, known):
    probe = Probe("on_predict_start", lambda t: internals.has_batch_indices(as_list(t.predict_dataloaders)[0]))
    trainer(tmp_path, [probe]).predict(ToyModule(), data)
    assert probe.results == [known]
    assert not internals.has_batch_indices(loader(8, 1))
