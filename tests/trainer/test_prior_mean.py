"""The pretrained weights are captured once for each module, before a checkpoint overwrites them."""

from __future__ import annotations

import pickle

import pytest
import torch
from fake_trainer import FakeTrainer
from toy import ToyModule

from bmoe_lightning.experts import find_expert_layers
from bmoe_lightning.trainer.prior_mean import PriorMean

DOWN = "network.model.layers.0.mlp.experts.down_proj"


def test_copies_on_the_cpu():
    module = ToyModule()
    prior_mean = PriorMean(find_expert_layers)
    assert prior_mean.weights is None
    prior_mean.capture(module)
    before = module.get_parameter(DOWN).detach().clone()
    torch.nn.init.zeros_(module.get_parameter(DOWN))
    assert prior_mean.is_of(module)
    assert torch.equal(prior_mean.weights[DOWN], before)
    assert len(prior_mean.weights) == 2


def test_captured_once_for_each_module():
    module, other = ToyModule(), ToyModule(seed=1)
    prior_mean = PriorMean(find_expert_layers)
    prior_mean.capture(module)
    first = prior_mean.weights
    prior_mean.capture(module)
    assert prior_mean.weights is first
    prior_mean.capture(other)
    assert prior_mean.is_of(other)
    assert not prior_mean.is_of(module)
    assert torch.equal(prior_mean.weights[DOWN], other.get_parameter(DOWN))


def test_nothing_is_captured_unless_needed_nor_without_experts():
    for prior_mean, module in ((PriorMean(None), ToyModule()), (PriorMean(find_expert_layers), torch.nn.Linear(2, 2))):
        prior_mean.capture(module)
        assert prior_mean.weights is None
        assert not prior_mean.is_of(module)


@pytest.mark.parametrize("restoring", [False, True])
def test_on_load_of_a_checkpoint_alone(restoring):
    module = ToyModule()
    before = module.get_parameter(DOWN).detach().clone()
    prior_mean = PriorMean(find_expert_layers)
    prior_mean.capture_on_load(FakeTrainer(restoring=restoring), module)
    module.load_state_dict(ToyModule(seed=1).state_dict())
    assert prior_mean.is_of(module) == restoring
    if restoring:
        assert torch.equal(prior_mean.weights[DOWN], before)


def test_hook_is_removed():
    module = ToyModule()
    prior_mean = PriorMean(find_expert_layers)
    prior_mean.remove_hook()
    prior_mean.capture_on_load(FakeTrainer(restoring=True), module)
    prior_mean.remove_hook()
    prior_mean.remove_hook()
    module.load_state_dict(ToyModule(seed=1).state_dict())
    assert prior_mean.weights is None


def test_can_be_pickled_without_its_module():
    """For strategies that spawn processes."""
    module = ToyModule()
    prior_mean = PriorMean(find_expert_layers)
    prior_mean.capture(module)
    prior_mean.capture_on_load(FakeTrainer(restoring=True), module)
    written = pickle.dumps(prior_mean)
    found = pickle.loads(written)
    assert found.weights.keys() == prior_mean.weights.keys()
    assert torch.equal(found.weights[DOWN], prior_mean.weights[DOWN])
    assert not found.is_of(module)
    assert prior_mean.is_of(module)
    assert len(written) < 2 * sum(value.nbytes for value in prior_mean.weights.values()) + 10_000
