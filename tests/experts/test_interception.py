"""Layers are intercepted for a while, those that are tied to them too."""

from __future__ import annotations

import pytest
import torch
from oracles.cases import built_with_layers, layouts
from oracles.models import answer_logits, toy_batch, toy_model

from bmoe_lightning.experts import find_expert_layers, find_linear_layers
from bmoe_lightning.experts.interception import intercepted_layers


class Counter:
    """A tap that counts slots and changes nothing."""

    def __init__(self):
        self.slots = 0

    def record(self, inputs, experts, outputs, tokens, num_tokens):
        self.slots += len(inputs)
        return outputs


@layouts
def test_taps_and_dropout(layout):
    _, model, layers = built_with_layers(layout)
    plain = answer_logits(model, toy_batch())[0]
    taps = [Counter() for _ in layers]
    with intercepted_layers(model, layers, taps=taps):
        torch.testing.assert_close(answer_logits(model, toy_batch())[0], plain)
    assert [tap.slots for tap in taps] == [5 * 7 * 2] * 2
    with intercepted_layers(model, layers, dropout=lambda x, training: 0 * x):
        assert not torch.allclose(answer_logits(model, toy_batch())[0], plain)
    torch.testing.assert_close(answer_logits(model, toy_batch())[0], plain)
    assert [tap.slots for tap in taps] == [5 * 7 * 2] * 2


def test_several_layouts_at_once():
    model = toy_model()
    layers = [*find_expert_layers(model), *find_linear_layers(model, "head", first_index=2)]
    taps = [Counter() for _ in layers]
    with intercepted_layers(model, layers, taps=taps):
        answer_logits(model, toy_batch())
    assert all(tap.slots for tap in taps)


def test_one_tap_for_each_layer():
    _, model, layers = built_with_layers("fused")
    with pytest.raises(ValueError, match=r"argument 2 is (longer|shorter)"), intercepted_layers(model, layers, taps=[]):
        pass
