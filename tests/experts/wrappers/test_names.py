"""Names and modules below wrappers."""

import torch
from oracles.cases import covariance
from oracles.models import as_modules, toy_batch, toy_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from bmoe_lightning.experts import (
    find_expert_layers,
    weight_fingerprint,
)
from bmoe_lightning.experts.discovery import locate_expert_layers
from bmoe_lightning.experts.wrappers.names import inner_name, is_wrapped_name, plain_name, unwrapped

BATCH = toy_batch()


def test_checkpoint_wrappers_change_no_names():
    model = as_modules(toy_model())
    layers, fingerprint = find_expert_layers(model), weight_fingerprint(model, find_expert_layers(model))
    expected = covariance(model)
    for expert in model.layers[0].mixture.crew:
        expert.fall = checkpoint_wrapper(expert.fall)
    model.layers[1] = checkpoint_wrapper(model.layers[1])
    wrapped = find_expert_layers(model)
    assert [layer.down_proj for layer in wrapped] == ["fall"] * 2
    assert [plain_name(layer.name) for layer in wrapped] == [layer.name for layer in layers]
    assert locate_expert_layers(model, layers) == wrapped
    assert weight_fingerprint(model, wrapped) == fingerprint
    torch.testing.assert_close(covariance(model), expected)


def test_unwrapping():
    linear = nn.Linear(3, 2)
    assert unwrapped(checkpoint_wrapper(checkpoint_wrapper(linear))) is linear
    assert unwrapped(torch.compile(linear)) is linear
    assert inner_name(linear) is None
    assert plain_name("a._orig_mod.b.base_layer.base_layer.c") == "a.b.c"
    assert plain_name("a.modules_to_save.default.c") == "a.c"
    assert [is_wrapped_name(name) for name in ("a.base_layer", "a.modules_to_save.x", "a.b", "a")] == [
        True,
        True,
        False,
        False,
    ]
