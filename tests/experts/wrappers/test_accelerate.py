"""Weights that accelerate offloads are found, and the model runs as before."""

import pytest
import torch
from oracles.cases import covariance
from oracles.models import as_modules, tiny_qwen, toy_model
from oracles.own_models import Buffers, with_mixtures

from bmoe_lightning.curvature import collect_factors
from bmoe_lightning.experts import (
    down_proj_weights,
    find_expert_layers,
    squared_distances,
    weight_fingerprint,
)
from bmoe_lightning.experts.wrappers.accelerate import (
    execution_device,
    forward_attribute,
    materialized,
    offload_hook,
    offloaded_weights,
)
from recipes.supported_models.tiny import build


@pytest.mark.parametrize("layout", ["fused", "modules", "registered"])
@pytest.mark.parametrize("disk", [False, True])
def test_offloaded_weights(layout, disk, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    if layout == "registered":
        model = with_mixtures(Buffers)
    else:
        model = toy_model() if layout == "fused" else as_modules(toy_model())
    layers = find_expert_layers(model)
    reference = {n: w.clone() for layer in layers for n, w in down_proj_weights(model, layer).items()}
    expected, fingerprint = covariance(model), weight_fingerprint(model, layers)
    if disk:
        accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    else:
        accelerate.cpu_offload(model, execution_device="cpu")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    layers = find_expert_layers(model)
    torch.testing.assert_close(covariance(model), expected)
    assert weight_fingerprint(model, layers) == fingerprint
    assert all(float(d.sum()) == 0 for d in squared_distances(model, layers, reference))


def test_a_family_with_an_adapter_offloaded():
    accelerate = pytest.importorskip("accelerate")
    tiny = build("step3p7")
    layers, (batch, _) = find_expert_layers(tiny.model), tiny.batches
    expected = collect_factors(tiny.model, tiny.class_logits, [batch], rank=3, layers=layers)
    accelerate.cpu_offload(tiny.model, execution_device="cpu")
    found = collect_factors(tiny.model, tiny.class_logits, [batch], rank=3)
    for layer, other in zip(found.layers, expected.layers, strict=True):
        torch.testing.assert_close(layer.g_trace, other.g_trace)
    assert found.fingerprint == expected.fingerprint


def test_no_weights_at_all():
    with torch.device("meta"):
        model = tiny_qwen()
    layers = find_expert_layers(model)  # what there will be can be told without weights
    with pytest.raises(ValueError, match="weights are on the meta device, which holds no values"):
        squared_distances(model, layers, None)


def test_private_names_of_hooks():
    accelerate = pytest.importorskip("accelerate")
    model = torch.nn.Sequential(torch.nn.Linear(2, 3))
    (linear,) = model
    weight = linear.weight.detach().clone()
    assert offload_hook(linear) is None
    assert offloaded_weights(linear) is None
    assert forward_attribute(linear) == "forward"
    assert execution_device(linear) == torch.device("cpu")
    accelerate.cpu_offload(model, execution_device="cpu")
    assert torch.device(offload_hook(linear).execution_device) == torch.device("cpu")
    assert torch.equal(offloaded_weights(linear)["weight"], weight)
    assert forward_attribute(linear) in vars(linear)
    assert linear.weight.device.type == "meta"
    assert execution_device(linear) == torch.device("cpu")
    assert torch.equal(materialized(linear, "weight"), weight)
