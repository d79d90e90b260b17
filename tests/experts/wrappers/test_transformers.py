"""Private attributes of transformers, on real models."""

from pathlib import Path

import pytest
import torch
import transformers
from oracles.models import tiny_qwen, toy_model
from packaging.version import Version
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from bmoe_lightning.experts import (
    find_expert_layers,
    find_linear_layers,
)
from bmoe_lightning.experts.wrappers.transformers import (
    can_checkpoint_with_cache,
    checkpoint_function,
    experts_implementation_attribute,
    has_parallel_plan,
    outermost_pretrained,
)


@pytest.mark.parametrize("how", ["_is_expert_parallel", "_is_hooked"])
def test_parallel_plans_are_refused(how):
    model = toy_model()
    setattr(model.layers[1].mixture.crew, how, True)
    with pytest.raises(ValueError, match=r"'layers.1.mixture.crew' are sharded by expert or tensor parallelism"):
        find_expert_layers(model)
    linear = toy_model()
    linear.layers[0].value._is_hooked = True
    if how == "_is_hooked":
        with pytest.raises(ValueError, match=r"'layers.0.value' is sharded by tensor parallelism"):
            find_linear_layers(linear, "*.value")


def test_expert_parallelism_is_refused():
    model = toy_model()
    model.layers[0].mixture.crew._is_expert_parallel = True
    with pytest.raises(ValueError, match=r"'layers.0.mixture.crew' are sharded by expert or tensor parallelism"):
        find_expert_layers(model)


def source_of_transformers(pattern):
    folder = Path(transformers.__file__).parent
    files = [*folder.glob("distributed/*.py"), *folder.glob("integrations/*.py"), folder / "modeling_utils.py"]
    return any(pattern in file.read_text() for file in files)


def test_marks_of_parallel_plans():
    assert source_of_transformers("._is_hooked = True")
    if Version(transformers.__version__) >= Version("5.21"):
        assert tiny_qwen().model.layers[0].mlp.experts._is_expert_parallel is False
    assert not has_parallel_plan(tiny_qwen().model.layers[0].mlp.experts)


def test_experts_implementation():
    config = tiny_qwen().config
    name = experts_implementation_attribute(config)
    assert name == "_experts_implementation_internal"
    assert getattr(config, name) == config._experts_implementation
    assert experts_implementation_attribute(object()) == "_experts_implementation"


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_gradient_checkpointing():
    model = tiny_qwen()
    layer = model.model.layers[0]
    assert isinstance(layer, GradientCheckpointingLayer)
    assert can_checkpoint_with_cache(layer) is False
    assert checkpoint_function(layer) is checkpoint
    model.gradient_checkpointing_enable()
    assert checkpoint_function(layer) is layer._gradient_checkpointing_func
    assert checkpoint_function(layer) is not checkpoint


def test_outermost_pretrained():
    first, second = tiny_qwen(), tiny_qwen()
    held = torch.nn.ModuleDict({"a": first, "b": torch.nn.ModuleDict({"c": second}), "d": torch.nn.Linear(2, 2)})
    assert outermost_pretrained(held) == [first, second]
    assert outermost_pretrained(first) == [first]
    assert outermost_pretrained(torch.nn.Linear(2, 2)) == []
