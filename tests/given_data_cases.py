"""What the tests of the data of a fit share: splits, the same ones changed, and loaders that vary."""

from __future__ import annotations

import numpy as np
import torch
from methods_cases import RANK3
from oracles.models import answer_logits, split, taken, toy_batch, toy_model
from torch.utils.data import DataLoader

from bmoe_lightning.curvature import Curvature
from bmoe_lightning.methods import fit_methods

MODEL = toy_model(num_layers=1)
TRAINING = toy_batch(num_rows=80, seed=3)
HELD_OUT = toy_batch(num_rows=112, seed=4)
OTHER = Curvature(rank=2)
OTHERS = "the {} data are not those of the existing fit: {}"


def batches(data, size=40):
    count = len(data["ids"])
    return split(data, *[min(size, count - start) for start in range(0, count, size)])


def shuffled(data):
    return taken(data, torch.randperm(len(data["labels"]), generator=torch.Generator().manual_seed(1)))


def padded(data):
    """In wider batches."""
    more = {"ids": 0, "mask": 0}
    return {
        name: torch.nn.functional.pad(value, (3, 0), value=more[name]) if name in more else value
        for name, value in data.items()
    }


def relabelled(data, *rows):
    labels = data["labels"].clone()
    labels[list(rows)] = (labels[list(rows)] + 1) % 4
    return {**data, "labels": labels}


def replaced(data, *rows):
    others = toy_batch(num_rows=len(data["labels"]), seed=9)
    changed = {name: data[name].clone() for name in ("ids", "mask")}
    for name, values in changed.items():
        values[list(rows)] = others[name][list(rows)]
    return {**data, **changed}


def swapped(data):
    """The labels of two examples."""
    labels = data["labels"].clone()
    one, other = (int((labels == label).nonzero()[0]) for label in (0, 1))
    labels[one], labels[other] = 1, 0
    return {**data, "labels": labels}


def exchanged(data):
    """Two examples in each other's place, all others in theirs."""
    order = torch.arange(len(data["labels"]))
    order[[2, 5]] = order[[5, 2]]
    return taken(data, order)


class Loader:
    """Batches that are drawn anew in each pass."""

    def __init__(self, draw):
        self.draw, self.passes = draw, 0

    def __iter__(self):
        self.passes += 1
        return iter(batches(self.draw()))


class Augmented(torch.utils.data.Dataset):
    """Some tokens of each example are others whenever it is read."""

    def __init__(self, draw):
        self.draw = draw

    def __len__(self):
        return 80

    def __getitem__(self, row):
        found = {name: value[row].clone() for name, value in TRAINING.items()}
        found["ids"][self.draw(7) % 7] = self.draw(30) % 30
        return found


def numpy_draw(high):
    return int(np.random.randint(high))


def torch_draw(high):
    return int(torch.randint(high, ()))


def part_of(data, size):
    return taken(data, torch.from_numpy(np.random.permutation(len(data["labels"]))[:size]))


VARYING = {
    "augmented": lambda: DataLoader(Augmented(numpy_draw), 16),
    "augmented by torch": lambda: DataLoader(Augmented(torch_draw), 16),
    "augmented in another order": lambda: DataLoader(Augmented(numpy_draw), 16, shuffle=True),
    "a part": lambda: Loader(lambda: part_of(TRAINING, 64)),
    "one augmented example": lambda: Loader(lambda: replaced(TRAINING, 60 + numpy_draw(20))),
    "other labels": lambda: Loader(lambda: relabelled(TRAINING, numpy_draw(80))),
    "another order": lambda: Loader(lambda: part_of(TRAINING, 80)),
}
UNKNOWN = "it is unknown whether the training data are those of the existing fit: they differ from one pass to the next"


def fit(methods, training=TRAINING, held_out=HELD_OUT, earlier=None, size=40, **options):
    return fit_methods(
        [method.with_defaults(RANK3) for method in methods],
        MODEL,
        answer_logits,
        training if not isinstance(training, dict) else batches(training, size),
        held_out if not isinstance(held_out, dict) else batches(held_out, size),
        earlier=earlier,
        **options,
    )
