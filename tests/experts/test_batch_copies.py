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


class Slots:
    __slots__ = ("ids", "other")

    def __init__(self, ids):
        self.ids = ids


def whole():
    """A batch object with a part that refers to it."""
    batch = Plain(ids(), ids())
    batch.part = Plain([ids()], types.SimpleNamespace(whole=batch, names={"a": "b"}))
    return batch


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
        (Plain(Plain(ids(), 1), None), lambda b: delattr(b.ids, "ids"), lambda b: b.ids.ids),
        (Plain(Plain(1, {"a": [ids()]}), None), lambda b: b.ids.labels.clear(), lambda b: b.ids.labels["a"][0]),
        (Plain(Slots(ids()), None), lambda b: delattr(b.ids, "ids"), lambda b: b.ids.ids),
        (whole(), lambda b: b.part.ids.pop(), lambda b: b.part.labels.whole.part.ids[0]),
        ({"ids": np.arange(4)}, lambda b: b.pop("ids"), lambda b: b["ids"]),
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


@pytest.mark.parametrize(
    ("part", "write", "name"),
    [
        (np.arange(4), lambda x: operator.setitem(x, 0, 7), "batch.ids"),
        (np.asfortranarray(np.ones((3, 2))), lambda x: operator.setitem(x, (0, 1), 7), "batch.ids"),
        (np.array([1.0, np.nan]), lambda x: operator.iadd(x, 1), "batch.ids"),
        (np.zeros((4, 4))[:, ::2], lambda x: operator.iadd(x, 1), "batch.ids"),
        (np.array(["a", "b"]), lambda x: operator.setitem(x, 1, "c"), "batch.ids"),
        (np.array(5), lambda x: operator.iadd(x, 1), "batch.ids"),
        (np.zeros((300, 1000)), lambda x: operator.iadd(x, 1), "batch.ids"),
        (Plain(ids(), None), lambda x: x.ids.data.add_(1), "batch.ids.ids"),
        (Slots(Plain(ids(), None)), lambda x: x.ids.ids.add_(1), "batch.ids.ids.ids"),
        (whole(), lambda x: x.part.labels.whole.ids.add_(1), "batch.ids.ids"),
    ],
)
def test_a_write_to_an_array_or_a_nested_object_is_named(part, write, name):
    check = WriteCheck(Plain(part, ids()))
    check.check("test_step")
    write(part)
    with pytest.raises(RuntimeError, match=f"test_step writes in place to {name},"):
        check.check("test_step")


@pytest.mark.parametrize("write", [lambda x: x.sub_(0), lambda x: x.unsqueeze_(0).squeeze_(0), lambda x: x.copy_(x)])
def test_a_write_that_changes_no_value_of_a_small_tensor_is_not_named(write):
    batch = {"labels": ids()}
    check = WriteCheck(batch)
    write(batch["labels"])
    check.check("test_step")


def test_a_tokenizer_in_a_batch_stays_the_same_object():
    tokenizer = types.SimpleNamespace(vocabulary={str(number): number for number in range(1000)}, special=["<s>"])
    batch = Plain(ids(), tokenizer)
    assert copied_containers(batch).labels is tokenizer


def test_what_is_not_written_to_is_not_named():
    values = torch.tensor([1.0, torch.nan, torch.inf])
    batch = [
        values,
        torch.zeros(2, 0),
        torch.zeros(2).to_sparse(),
        torch.zeros(2, device="meta"),
        torch.zeros(()),
        np.array([1.0, np.nan]),
        np.array([None, {}], dtype=object),
        np.array(["a", "b", "c"])[::-1],
        np.zeros(0),
        np.broadcast_to(np.zeros(1), (3,)),
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
