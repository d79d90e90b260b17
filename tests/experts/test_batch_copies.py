"""Copies of a batch's containers, and writes to its tensors."""

from __future__ import annotations

import types
from collections import namedtuple
from dataclasses import dataclass

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


def test_inference_tensors_have_no_counter():
    with torch.inference_mode():
        WriteCheck([torch.ones(2)]).check("test_step")
