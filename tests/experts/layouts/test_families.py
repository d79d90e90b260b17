"""Families of transformers that are registered: the classes exist, and their forwards run in the survey's tests."""

from __future__ import annotations

import importlib

import pytest
from torch import nn

from bmoe_lightning.experts.layouts import families, registered

FAMILIES = sorted(name for name in (*registered._ADAPTERS, *registered._REFUSALS) if name.startswith(families._MODELS))


def test_all_families_are_there():
    assert {name.split(".")[2] for name in FAMILIES} == {
        "dbrx",
        "doge",
        "jetmoe",
        "llama4",
        "longcat_flash",
        "step3p7",
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_class_exists(name):
    module, _, kind = name.rpartition(".")
    found = getattr(importlib.import_module(module), kind)
    assert issubclass(found, nn.Module)
    assert f"{found.__module__}.{found.__qualname__}" == name
