"""Small runs of a linear model that remembers its batches, and loaders whose order can differ."""

from __future__ import annotations

import lightning as L
import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, Sampler, TensorDataset
from toy import trainer


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


SHUFFLING = {
    "no generator": lambda g: loader(shuffle=True),
    "loader": lambda g: loader(shuffle=True, generator=g),
    "in order": lambda g: loader(generator=g),
    "sampler": lambda g: loader(sampler=RandomSampler(numbers(20), generator=g)),
    "batch sampler": lambda g: DataLoader(
        numbers(20), batch_sampler=BatchSampler(RandomSampler(numbers(20), generator=g), 8, False)
    ),
}


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
