"""Modules and parameters in the order of torch's own generators."""

from __future__ import annotations

import pytest
import torch
from oracles.models import toy_model
from torch import nn

from bmoe_lightning.experts.module_tree import (
    all_modules,
    all_parameters,
    module_at,
    modules_collected,
    own_parameters,
)


class Shared(nn.Module):
    """Shared modules and parameters, a parameter under two names, an empty slot of each, and a cycle."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU())
        self.again = self.first
        self.second.append(self.second[0])
        self.second[0].other = self.first.weight
        self.weight = nn.Parameter(torch.zeros(1))
        self.same = self.weight
        self.register_parameter("none", None)
        self.register_module("nothing", None)
        self.second[1].add_module("above", self.second)


def test_modules_are_those_of_torch():
    for model in (Shared(), toy_model(num_layers=2), torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))):
        assert [id(module) for module in all_modules(model)] == [id(module) for module in model.modules()]


def test_parameters_are_those_of_torch():
    for model in (Shared(), toy_model(num_layers=2)):
        assert [id(parameter) for parameter in all_parameters(model)] == [id(p) for p in model.parameters()]
        for module in model.modules():
            assert set(map(id, own_parameters(module))) == set(map(id, module.parameters(recurse=False)))


def test_a_module_is_found_by_its_name():
    model = toy_model(num_layers=2)
    for name, module in model.named_modules():
        assert module_at(model, name) is module
    for name in ("layers.7", "nowhere", "head.weight"):
        with pytest.raises(AttributeError, match=f"ToyMoE has no module '{name}'"):
            module_at(model, name)
    with pytest.raises(AttributeError, match="has no module 'nothing'"):
        module_at(Shared(), "nothing")


def test_modules_are_collected_once_for_one_model():
    model, other = toy_model(), toy_model()
    with modules_collected(model):
        assert all_modules(model) is all_modules(model)
        assert len(all_modules(model.head)) == 1
        assert all_modules(other)[0] is other
        model.added = nn.ReLU()
        assert model.added not in all_modules(model)
    assert model.added in all_modules(model)
