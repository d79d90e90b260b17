"""Linear layers whose weight cannot be tapped are refused."""

import pytest
import torch
from oracles.models import answer_logits, toy_batch, toy_model
from torch import nn

from bmoe_lightning.experts import (
    find_linear_layers,
    tapped_batch,
)


def test_weights_that_are_computed_from_others():
    model = toy_model()
    torch.nn.utils.parametrizations.weight_norm(model.layers[0].value)
    with pytest.raises(ValueError, match=r"the weight of 'layers.0.value' is parametrised"):
        find_linear_layers(model, "*.value")


def test_what_only_looks_like_a_linear_layer():
    class Odd(nn.Module):
        in_features = out_features = 6

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(6, 6))

    with pytest.raises(ValueError, match="no linear layer of ModuleDict matches"):
        find_linear_layers(nn.ModuleDict({"odd": Odd()}), "*")
    with pytest.raises(ValueError, match="or not initialised"):
        find_linear_layers(nn.ModuleDict({"lazy": nn.LazyLinear(3)}), "*")


def test_inputs_that_were_split_are_noticed():
    """By torch's own tensor parallelism, say, which leaves no mark on the modules."""
    model = toy_model()
    layers = find_linear_layers(model, "head")
    model.head.register_forward_pre_hook(lambda _, inputs: (inputs[0][..., :3],))
    model.head.weight = nn.Parameter(model.head.weight[:, :3].detach())
    with (
        pytest.raises(RuntimeError, match="'head' got 3 of its 6 inputs: it is sharded by"),
        tapped_batch(model, layers, answer_logits, toy_batch()),
    ):
        pass
