"""Values in a fit's files that no fit has are refused."""

from __future__ import annotations

import math

import pytest
import torch

from bmoe_lightning.curvature import GradientShare
from bmoe_lightning.methods.stored_values import (
    stored_calibration,
    stored_options,
    stored_shares,
    stored_sizes,
    stored_texts,
)

LOGITS = torch.tensor([[1.0, -torch.inf, 2.0], [0.0, 1.0, 2.0]], dtype=torch.float64)
LABELS = torch.tensor([2, -1])  # -1: no label


def test_held_out_data_come_back():
    assert stored_calibration(None) is None
    assert stored_calibration({"logits": LOGITS}) == (LOGITS, None)
    assert stored_calibration({"logits": LOGITS, "labels": LABELS}) == (LOGITS, LABELS)


@pytest.mark.parametrize(
    "changes",
    [
        {"logits": LOGITS.float()},
        {"logits": LOGITS.flatten()},
        {"logits": LOGITS[:1]},
        {"logits": LOGITS * math.nan},
        {"logits": -LOGITS},  # plus infinity
        {"labels": LABELS.double()},
        {"labels": LABELS[None]},
        {"labels": LABELS + 1},
    ],
)
def test_held_out_data_of_no_fit(changes):
    with pytest.raises(ValueError, match="not those of a fit"):
        stored_calibration({"logits": LOGITS, "labels": LABELS, **changes})


def test_types_of_the_index():
    assert stored_options({"options": {"a": 1}}) == {"a": 1}
    assert stored_texts(["a", "b"]) == ("a", "b")
    for wrong in (None, [1], "ab", {"a": 1}):
        with pytest.raises(TypeError):
            stored_texts(wrong)
        with pytest.raises(TypeError):
            stored_options({"options": wrong if not isinstance(wrong, dict) else [wrong]})


SHARE = {"share": 0.25, "standard_error": None, "num_passes": 3, "reason": ""}


def test_shares():
    assert stored_shares({}) == {}
    found = stored_shares({"a": {**SHARE, "of a later version": 1}, "b": {**SHARE, "share": None, "reason": "why"}})
    assert found == {"a": GradientShare(0.25, None, 3), "b": GradientShare(None, None, 3, "why")}
    found = stored_shares({"a": {**SHARE, "num_trained": 12, "is_assumed": True}})
    assert found == {"a": GradientShare(0.25, None, 3, "", 12, True)}
    for wrong in ([], None, {"a": 1}, *({"a": {**SHARE, **change}} for change in CHANGES)):
        with pytest.raises(TypeError):
            stored_shares(wrong)
    with pytest.raises(KeyError):
        stored_shares({"a": {"share": 0.25}})


CHANGES = (
    {"share": 1.5},
    {"share": -0.1},
    {"share": "1"},
    {"standard_error": math.nan},
    {"num_passes": 1.5},
    {"reason": 1},
    {"num_trained": -1},
    {"num_trained": 1.5},
    {"is_assumed": 1},
)


def test_sizes():
    assert stored_sizes({"a": 1}) == {"a": 1}
    for wrong in ([], {"a": 0}, {"a": 1.5}, {"a": True}, {"a": "1"}, None):
        with pytest.raises(TypeError, match="expected a mapping of names to sizes in bytes"):
            stored_sizes(wrong)
