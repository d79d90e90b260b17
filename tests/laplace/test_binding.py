"""The layers of a posterior in a model: found once, and again when the model is another one."""

from __future__ import annotations

import gc

import pytest
import torch
from oracles.models import answer_logits, toy_batch, toy_model

from bmoe_lightning.curvature import collect_factors
from bmoe_lightning.laplace.binding import Binding


@pytest.fixture(scope="module")
def factors():
    return collect_factors(toy_model(), answer_logits, [toy_batch(8)], rank=2)


def test_holds_for_one_model_with_these_weights(factors):
    model = toy_model()
    binding = Binding.of(model, factors, offload=False)
    assert binding.is_of(model)
    assert not binding.is_of(toy_model())
    assert not binding.is_of(torch.nn.Sequential(model))  # the layers have other names
    with torch.no_grad():
        model.layers[1].mixture.crew.down_proj[0, 0, 0] += 0
    assert not binding.is_of(model)  # written to


def test_holds_no_model_in_memory(factors):
    model = toy_model()
    binding = Binding.of(model, factors, offload=False)
    del model
    gc.collect()
    assert binding.model() is None


def test_layers_are_those_of_the_model(factors):
    wrapped = torch.nn.ModuleDict({"model": toy_model()})
    binding = Binding.of(wrapped, factors, offload=True)
    assert [layer.name for layer in binding.layers] == [f"model.{layer.name}" for layer in factors.layers]
    assert binding.factors is factors.layers


@pytest.mark.parametrize("change", [{"width": 8}, {"inner": 7}, {"num_experts": 5}])
def test_layers_of_another_size_are_refused(factors, change):
    with pytest.raises(ValueError, match=r"does not fit the model's 'layers\.0.*load it with the model"):
        Binding.of(toy_model(**change), factors, offload=False)
