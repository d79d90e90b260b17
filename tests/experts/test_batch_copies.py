"""Copies of a batch's containers, and writes to its tensors."""

from __future__ import annotations

import operator
import types
from collections import namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from transformers import BatchEncoding

from bmoe_lightning.experts.batch_copies import WriteCheck, copied_containers

Pair = namedtuple("Pair", "ids labels")


@dataclass(frozen=True)
class Frozen:
    ids: torch.Tensor
    extra: dict


class Plain:
    def __init__(self, ids, labels):
        self.ids = ids
        self.labels = labels


def ids():
    return torch.arange(4)


@pytest.mark.parametrize(
    ("batch", "consume", "seen"),
    [
        ({"ids": ids(), "labels": ids()}, lambda b: b.pop("labels"), lambda b: b["labels"]),
        (BatchEncoding({"ids": ids()}), lambda b: b.pop("ids"), lambda b: b["ids"]),
        ([ids(), {"labels": ids()}], lambda b: b[1].clear(), lambda b: b[1]["labels"]),
        ((ids(), [ids()]), lambda b: b[1].pop(), lambda b: b[1][0]),
        (Pair(ids(), {"a": [ids()]}), lambda b: b.labels["a"].pop(), lambda b: b.labels["a"][0]),
        (Frozen(ids(), {"labels": ids()}), lambda b: b.extra.pop("labels"), lambda b: b.extra["labels"]),
        (Plain(ids(), ids()), lambda b: delattr(b, "labels"), lambda b: b.labels),
        (types.SimpleNamespace(a={"b": [ids()]}), lambda b: b.a["b"].clear(), lambda b: b.a["b"][0]),
    ],
)
def test_a_copy_is_not_consumed(batch, consume, seen):
    tensor = seen(batch)
    copy = copied_containers(batch)
    assert type(copy) is type(batch)
    consume(batch)
    with pytest.raises((KeyError, IndexError, AttributeError)):
        seen(batch)
    assert seen(copy) is tensor  # shared, not cloned


@pytest.mark.parametrize("batch", [None, 3, "text", len, torch.nn.Linear(1, 1), types.MappingProxyType({"a": 1})])
def test_anything_else_stays_the_same_object(batch):
    assert copied_containers(batch) is batch


@pytest.mark.parametrize(
    ("batch", "write", "name"),
    [
        (ids(), lambda b: b.add_(1), "to batch,"),
        ({"a": [ids(), {"b": ids()}]}, lambda b: b["a"][1]["b"].clamp_(max=1), r"batch\['a'\]\[1\]\['b'\]"),
        (Frozen(ids(), {}), lambda b: b.ids[:2].zero_(), r"batch\.ids"),  # a view counts for its base
        (Plain([ids()], 1), lambda b: b.ids[0].fill_(1), r"batch\.ids\[0\]"),
        (types.MappingProxyType({"a": ids()}), lambda b: b["a"].mul_(2), r"batch\['a'\]"),
    ],
)
def test_a_write_is_named(batch, write, name):
    check = WriteCheck(batch)
    check.check("test_step")
    write(batch)
    with pytest.raises(RuntimeError, match=f"test_step writes in place {name if 'to' in name else 'to ' + name}"):
        check.check("test_step")


@pytest.mark.parametrize(
    ("tensor", "write"),
    [
        (lambda: ids(), lambda x: x.data.add_(1)),
        (lambda: ids(), lambda x: operator.setitem(x.numpy(), 0, 7)),
        (lambda: torch.from_numpy(np.arange(6).reshape(2, 3)), lambda x: operator.iadd(x.numpy(), 1)),
        (lambda: torch.tensor([[True, False]]), lambda x: x.data.logical_not_()),
        (lambda: torch.tensor([1.0, torch.nan]), lambda x: x.data.mul_(2)),
        (lambda: torch.zeros(3), lambda x: x.data.fill_(torch.nan)),
        (lambda: torch.zeros(4, 3).T, lambda x: x.data[0].add_(1)),
        (lambda: torch.zeros(300, 1000), lambda x: x.data.sub_(1)),  # normalised in place: evenly spaced values
        (lambda: torch.tensor(5), lambda x: x.data.zero_()),
        (lambda: torch.zeros(3, dtype=torch.complex64), lambda x: x.data.add_(1j)),
    ],
)
def test_a_write_that_torch_does_not_count_is_named(tensor, write):
    batch = {"x": tensor(), "labels": ids()}
    count = batch["x"]._version
    check = WriteCheck(batch)
    check.check("test_step")
    write(batch["x"])
    assert batch["x"]._version == count
    with pytest.raises(RuntimeError, match=r"test_step writes in place to batch\['x'\], so"):
        check.check("test_step")


def test_what_is_not_written_to_is_not_named():
    values = torch.tensor([1.0, torch.nan, torch.inf])
    batch = [
        values,
        torch.zeros(2, 0),
        torch.zeros(2).to_sparse(),
        torch.zeros(2, device="meta"),
        torch.zeros(()),
        None,
    ]
    check = WriteCheck([*batch, torch.zeros(1 << 18).T, torch.zeros(1 << 10, 1 << 10).T], synchronise=True)
    values.sum()
    check.check("test_step")


def test_inference_tensors_have_no_counter():
    with torch.inference_mode():
        tensor = torch.ones(2)
        check = WriteCheck([tensor])
        check.check("test_step")
        tensor.add_(1)
        with pytest.raises(RuntimeError, match="writes in place"):
            check.check("test_step")
