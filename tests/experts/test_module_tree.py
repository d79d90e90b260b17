"""Modules and parameters in the order of torch's own generators."""

from __future__ import annotations

import torch
from oracles.models import toy_model
from torch import nn

from bmoe_lightning.experts.module_tree import all_modules, all_parameters, own_parameters


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
