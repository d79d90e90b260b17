"""What the pass over the data does to the model, and what it refuses."""

import pytest
import torch
from oracles.cases import built, layouts
from oracles.factors import assert_dense, dense_of, matrices
from oracles.models import (
    answer_logits,
    split,
    tiny_qwen,
    toy_batch,
    toy_model,
)
from oracles.waits import Waits

from bmoe_lightning.curvature import collect_factors
from bmoe_lightning.experts import find_expert_layers, weight_fingerprint
from bmoe_lightning.utils import devices


@pytest.mark.parametrize("sketch", ["nystrom", "rsvd", "exact"])
def test_transformers_model(sketch):
    model, batch = tiny_qwen(), toy_batch()
    factors = collect_factors(model, answer_logits, split(batch, 2, 3), rank=16, sketch=sketch)
    assert_dense(factors, dense_of(model, answer_logits, batch, "expand"), 1e-6)
    assert [layer.name for layer in factors.layers] == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    assert factors.fingerprint == weight_fingerprint(model, find_expert_layers(model))
    assert model.get_experts_implementation() == {"": "eager"}


def test_narrow_model_gives_float32_factors():
    model, batch = tiny_qwen(dtype=torch.bfloat16, implementation="grouped_mm"), toy_batch()
    wide = tiny_qwen(dtype=torch.bfloat16).double()
    factors = collect_factors(model, answer_logits, [batch], rank=16)
    reference = collect_factors(wide, answer_logits, [batch], rank=16)
    for layer, other in zip(factors.layers, reference.layers, strict=True):
        for name, tensor in layer.tensors().items():
            assert tensor.dtype == (torch.float64 if name in ("slots", "a_trace", "g_trace") else torch.float32)
        assert float(layer.slots.sum()) == float(other.slots.sum())
        ratio = (layer.slots * layer.g_trace).sum() / (other.slots * other.g_trace).sum()
        assert 0.5 < float(ratio) < 2


def test_only_some_layers():
    model, batch = toy_model(num_layers=3), toy_batch()
    layers = find_expert_layers(model)
    every = collect_factors(model, answer_logits, [batch], rank=2, sketch="nystrom")
    some = collect_factors(model, answer_logits, [batch], rank=2, sketch="nystrom", layers=layers[1:])
    assert [layer.index for layer in some.layers] == [1, 2]
    for x, y in zip(some.layers, every.layers[1:], strict=True):
        torch.testing.assert_close(matrices(x), matrices(y), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_touched(fails):
    model = tiny_qwen(implementation="batched_mm", dtype=torch.float32).train()
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    random_state = torch.get_rng_state()

    def batches():
        torch.rand(3)  # a shuffling loader draws, too
        yield toy_batch()
        if fails:
            raise ZeroDivisionError

    if fails:
        with pytest.raises(ZeroDivisionError):
            collect_factors(model, answer_logits, batches(), fisher="mc")
    else:
        collect_factors(model, answer_logits, batches(), fisher="mc")
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(module.training for module in model.modules())
    assert model.get_experts_implementation() == {"": "batched_mm"}
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad
        assert torch.equal(parameter, before[name])
        assert (parameter.grad is None) == (parameter is not model.lm_head.weight)
    assert bool((model.lm_head.weight.grad == 1).all())


def test_dropout_is_off():
    model, batch = tiny_qwen(attention_dropout=0.5).train(), toy_batch()
    first, second = (collect_factors(model, answer_logits, [batch]) for _ in range(2))
    assert all(torch.equal(x.g_trace, y.g_trace) for x, y in zip(first.layers, second.layers, strict=True))


@layouts
def test_an_input_that_overflows_names_layer_and_expert(layout):
    """The square of an activation leaves float32 although the logits are fine."""
    _, model = built(layout)
    model.float()
    crew = model.layers[0].mixture.crew
    with torch.no_grad():
        for number in (1, 3):
            up = crew.gate_up_proj[number, 5:] if layout == "fused" else crew[number].lift.weight
            down = crew.down_proj[number] if layout == "fused" else crew[number].fall.weight
            up.mul_(1e22)
            down.mul_(1e-22)
    name = find_expert_layers(model)[0].name
    with pytest.raises(ValueError, match=f"the a-factor of layer '{name}' is not finite for expert 1 and 1 more"):
        collect_factors(model, answer_logits, [toy_batch()])


@layouts
def test_a_gradient_that_overflows_names_layer_and_expert(layout):
    _, model = built(layout, idle=[0, 1, 2], top_k=1)
    model.float()

    def class_logits(m, batch):
        logits, labels = answer_logits(m, batch)
        return logits + 1e-3 * torch.sin(1e25 * logits), labels  # steep but bounded

    name = find_expert_layers(model)[0].name
    with pytest.raises(ValueError, match=f"the g-factor of layer '{name}' is not finite for expert 3:"):
        collect_factors(model, class_logits, [toy_batch()])


def test_bad_options():
    model, batch = toy_model(), toy_batch()
    for options, message in (
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"fisher": "type-2"}, "unknown fisher 'type-2'; valid are exact, mc, empirical"),
        ({"approximation": "sum"}, "unknown approximation 'sum'; valid are expand, reduce"),
        ({"sketch": "svd"}, "unknown sketch 'svd'"),
    ):
        with pytest.raises(ValueError, match=message):
            collect_factors(model, answer_logits, [batch], **options)
    with pytest.raises(ValueError, match="`batches` is empty"):
        collect_factors(model, answer_logits, [])
    with pytest.raises(ValueError, match="empirical Fisher needs labels"):
        collect_factors(model, lambda m, b: (answer_logits(m, b)[0], None), [batch], fisher="empirical")
    with pytest.raises(ValueError, match="returned probabilities"):
        collect_factors(model, lambda m, b: (answer_logits(m, b)[0].softmax(-1), None), [batch])
    with pytest.raises(ValueError, match="has no expert layers"):
        collect_factors(torch.nn.Linear(2, 2), answer_logits, [batch])


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("sketch", ["nystrom", "exact"])
def test_on_an_accelerator_nothing_is_waited_for(approximation, sketch, monkeypatch):
    """There slots that do not count are zeroed rather than left out: the same sums, without a word from the device."""
    counts, found = [], []
    for num_layers in (2, 6):
        model, batch = toy_model(num_layers=num_layers), toy_batch()
        expected = collect_factors(model, answer_logits, [batch], rank=3, approximation=approximation, sketch=sketch)
        with monkeypatch.context() as patch:
            patch.setattr(devices, "answers_at_once", lambda device: False)
            for batches in ([batch], [batch] * 3):
                with Waits() as waits:
                    factors = collect_factors(
                        model, answer_logits, batches, rank=3, approximation=approximation, sketch=sketch
                    )
                counts.append(waits.count)
                found.append((factors, expected))
    # What is left belongs to a batch or to the end of the pass: no layer's batch adds to it.
    (few, more), (few_of_many, more_of_many) = counts[:2], counts[2:]
    assert more - few == more_of_many - few_of_many
    factors, expected = found[2]
    for layer, other in zip(factors.layers, expected.layers, strict=True):
        assert torch.equal(layer.slots, other.slots)
        torch.testing.assert_close(matrices(layer), matrices(other), rtol=1e-8, atol=1e-11)
