"""What a layout has to implement."""

from __future__ import annotations

import pytest
from torch import nn

from bmoe_lightning.experts.types import ExpertLayer, Layout


def test_a_layer_is_a_value():
    one, other = (ExpertLayer("a.experts", 0, 2, 3, 4, "fused", "down_proj") for _ in range(2))
    assert one == other
    assert hash(one) == hash(other)
    assert not one.transposed
    with pytest.raises(AttributeError):
        one.index = 1


def test_a_layout_that_lacks_a_method_is_none():
    class Half(Layout):
        name, description = "half", "nothing"

    with pytest.raises(TypeError, match="abstract"):
        Half()


def test_models_need_no_preparation_by_default():
    with Layout.prepared(object(), nn.Linear(1, 1)):
        pass
    assert not Layout.uses_hooks
    assert not Layout.may_hold_block
