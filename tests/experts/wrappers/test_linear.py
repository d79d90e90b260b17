"""What linear layers multiply with, below wrappers."""

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from bmoe_lightning.experts.wrappers.linear import effective_weight, linear_shape, linear_weight_name, linears_of


def test_effective_weight():
    linear = nn.Linear(3, 2)
    assert torch.equal(effective_weight(linear), linear.weight)
    torch.testing.assert_close(effective_weight(checkpoint_wrapper(linear)), linear.weight.detach())


def test_linear_layers_under_the_outermost_name():
    linear = checkpoint_wrapper(nn.Linear(3, 2))
    model = nn.ModuleDict({"a": linear, "b": nn.ModuleDict({"c": nn.Linear(2, 4), "d": nn.ReLU()})})
    assert list(linears_of(model)) == ["a", "b.c"]
    assert [linear_shape(module) for module in linears_of(model).values()] == [(2, 3), (4, 2)]
    assert linear_weight_name(linear) == "_checkpoint_wrapped_module.weight"
    assert linear_weight_name(model["b"]["c"]) == "weight"
