"""What is known of data without a pass, and how two sets of logits and labels differ."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

from bmoe_lightning.methods.data_differences import (
    DataMismatchError,
    first_size,
    iterates_once,
    num_rows,
    refuse,
    split_difference,
)

LOGITS = torch.randn(40, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.arange(40) % 3


def test_a_few_that_changed_places_are_no_difference():
    order, one, other = torch.arange(40), int(LOGITS[::3, 0].argmax()) * 3, int(LOGITS[1::3, 0].argmin()) * 3 + 1
    order[[one, other]] = order[[other, one]]
    assert split_difference((LOGITS, LABELS), (LOGITS[order], LABELS[order])) == ""
    assert split_difference((LOGITS, LABELS), (LOGITS[order], LABELS)) != ""
    assert split_difference((LOGITS, LABELS), (LOGITS[order], None)) == ""
    assert split_difference((LOGITS, LABELS), (LOGITS[1:], LABELS[1:])) == "39 examples instead of 40"


def test_refusals_say_what_differs_and_what_to_do():
    refuse("training", "")
    refuse("training", None)
    with pytest.raises(
        DataMismatchError, match=r"the training data are not .*: 3 examples\. Pass the data that it was"
    ):
        refuse("training", "3 examples")


def test_what_is_known_without_a_pass():
    assert num_rows(DataLoader(range(10), 3)) == 10
    assert num_rows(DataLoader(range(10), 3, drop_last=True)) == -1
    assert num_rows([{"x": torch.zeros(4, 2)}, {"x": torch.zeros(3, 2)}]) == 7
    assert num_rows(["text"]) == num_rows(iter([])) == -1
    assert first_size({"name": "text", "x": torch.zeros(5)}) == 5
    assert iterates_once(iter([]))
    assert not iterates_once([])
