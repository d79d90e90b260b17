"""The digest by which a pass recognises its batches."""

import types
from collections import UserDict
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from bmoe_lightning.curvature.batch_digest import extended_digest
from bmoe_lightning.experts.counted_batch import CountedBatch


@dataclass
class Record:
    ids: torch.Tensor
    note: str = ""


class TestDigest:
    DIFFERENT = (
        {"a": torch.tensor([1, 2])},
        {"b": torch.tensor([1, 2])},
        {"a": torch.tensor([2, 1])},
        {"a": torch.tensor([[1, 2]])},
        {"a": torch.tensor([1, 2], dtype=torch.int32)},
        {"a": torch.tensor([1.0, 2.0])},
        {"a": torch.tensor([1.0, 2.0], dtype=torch.bfloat16)},
        {"a": torch.tensor([True, False])},
        {"a": torch.tensor([1 + 2j])},
        {"a": torch.tensor(1)},
        {"a": torch.empty(0)},
        {"a": [1, 2]},
        {"a": [[1], 2]},
        {"a": [1.0, 2]},
        {"a": [True, 2]},
        {"a": ["1", "2"]},
        {"a": "12"},
        ["a", "12"],
        ["a1", "2"],
        [{"a": 1}, {"b": 2}],
        [{"a": 1, "b": 2}],
        Record(torch.tensor([1, 2])),
        Record(torch.tensor([1, 2]), "x"),
        7,
        {"a": np.array([1, 2])},
        {"a": np.array([2, 1])},
        {"a": np.array([1, 2], dtype=np.int8)},
        {"a": np.float32(1)},
        {"a": b"12"},
        {"a": None},
        {"a": None, "b": 1},
        UserDict(b=torch.tensor([1, 2, 3])),
        {"a": np.array([1, "x"], dtype=object)},
        {"a": np.array([2, "x"], dtype=object)},
    )

    def test_is_another_one_for_other_batches(self):
        assert len({extended_digest("", batch) for batch in self.DIFFERENT}) == len(self.DIFFERENT)

    def test_is_the_same_for_the_same(self):
        def batch(x):
            return {"x": (x, [x, "y"]), "flag": True, "record": Record(x)}

        x = torch.arange(12.0).view(3, 4)
        assert extended_digest("d", batch(x)) == extended_digest("d", batch(x.T.contiguous().T))
        assert extended_digest("", torch.ones(2).conj()) == extended_digest("", torch.ones(2))

    def test_examples_that_do_not_count_are_told_apart(self):
        x = torch.arange(3)
        plain = extended_digest("", {"x": x})
        assert extended_digest("", CountedBatch({"x": x}, 3, 3)) == plain
        assert len({plain, *(extended_digest("", CountedBatch({"x": x}, n, 3)) for n in (1, 2))}) == 3

    def test_knows_what_came_before(self):
        one, other = self.DIFFERENT[0], self.DIFFERENT[2]
        orders = [extended_digest(extended_digest("", a), b) for a, b in ((one, other), (other, one), (one, one))]
        assert len(set(orders)) == 3
        assert extended_digest("", one) not in orders

    def test_mappings_of_any_class_count(self):
        """As a tokenizer's `BatchEncoding`."""
        x = torch.arange(3)
        assert extended_digest("", UserDict(x=x)) == extended_digest("", {"x": x})

    @pytest.mark.parametrize(
        "value",
        [
            object(),
            {1, 2},
            types.SimpleNamespace(a=torch.tensor([1, 2])),
            torch.eye(2).to_sparse(),
            Record,
        ],
    )
    def test_what_cannot_be_compared_is_refused(self, value):
        """Left out, it would let another batch pass for this one."""
        kind = type(value).__name__
        for batch in (value, {"a": [value], "b": 1}, Record(torch.ones(1), value)):
            with pytest.raises(ValueError, match=f"a batch contains a value of type {kind}, which .* disable the curv"):
                extended_digest("", batch)

    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
    def test_nested_tensors_are_refused(self):
        with pytest.raises(ValueError, match="a batch contains a value of type Tensor"):
            extended_digest("", torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]))

    @pytest.mark.parametrize("batch", [None, [None, []], {}])
    def test_batches_that_nothing_tells_apart_are_refused(self, batch):
        with pytest.raises(ValueError, match=r"a batch of type .* contains no values"):
            extended_digest("", batch)
