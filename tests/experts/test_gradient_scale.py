"""Backward passes through float16: the gradients that float32 has, however small they are."""

from __future__ import annotations

import copy

import pytest
import torch
from oracles.models import answer_logits, toy_batch, toy_model
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from bmoe_lightning import LaplacePosterior
from bmoe_lightning.curvature import collect_factors
from bmoe_lightning.experts import find_expert_layers, squared_distances, tapped_batch
from bmoe_lightning.experts.discovery import find_linear_layers
from bmoe_lightning.laplace.prior import fit_evidence
from bmoe_lightning.utils.fit_warnings import collected_fit_warnings


def class_logits(model, ids):
    return model(input_ids=ids, use_cache=False).logits[:, -1, [1, 2, 3]], None


@pytest.fixture(scope="module")
def wide_stream():
    """A model whose residual stream is as large as a trained one's, so that gradients at the experts are tiny."""
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_hidden_layers=3,
        vocab_size=100,
        num_experts=4,
        num_experts_per_tok=2,
    )
    model = Qwen2MoeForCausalLM(config).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1000)
    return model, [torch.randint(0, 100, (4, 48)) for _ in range(2)]


def slots(factors):
    return [layer.slots.tolist() for layer in factors.layers]


def halved(model):
    return copy.deepcopy(model).half()


@pytest.mark.filterwarnings("ignore:the evidence hardly depends")
@pytest.mark.parametrize("fisher", ["exact", "mc"])
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_curvature_equals_that_of_float32(wide_stream, fisher, approximation):
    model, batches = wide_stream
    half = halved(model)
    options = {"rank": 4, "fisher": fisher, "approximation": approximation}
    # The same weights: rounded to float16, then computed with in float32.
    expected = collect_factors(copy.deepcopy(half).float(), class_logits, batches, **options)
    found = collect_factors(half, class_logits, batches, **options)
    assert slots(found) == slots(expected)
    if approximation == "expand":
        assert [sum(of_layer) for of_layer in slots(expected)] == [2 * 4 * 48 * 2, 2 * 4 * 48 * 2, 2 * 4 * 2]
    distances = squared_distances(half, find_expert_layers(half), None)
    precisions = [
        fit_evidence(LaplacePosterior(factors).curvature, distances, "layer") for factors in (found, expected)
    ]
    torch.testing.assert_close(*precisions, rtol=0.02, atol=0)


def test_covariance_equals_that_of_float32(wide_stream):
    model, batches = wide_stream
    half = halved(model)
    single = copy.deepcopy(half).float()
    factors = collect_factors(single, class_logits, batches, rank=4)
    expected = LaplacePosterior(factors).logit_covariance(single, class_logits, batches[0])[1]
    found = LaplacePosterior(factors).logit_covariance(half, class_logits, batches[0])[1]
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))


@pytest.mark.parametrize("larger", [1, 60, 2000])
def test_automatic_mixed_precision(wide_stream, larger):
    """The weights are in float32 (`precision="16-mixed"`), and part of the backward pass runs in float16 nevertheless.

    The gradients at the experts are in float32 there: however small, nothing underflows, and nothing is said.
    """
    model, batches = copy.deepcopy(wide_stream)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(larger)
    expected = collect_factors(model, class_logits, batches, rank=4)
    with collected_fit_warnings() as said:
        found = collect_factors(model, mixed, batches, rank=4)
    assert said == []
    assert slots(found) == slots(expected)
    for one, other in zip(found.layers, expected.layers, strict=True):
        torch.testing.assert_close(one.g_trace, other.g_trace, rtol=0.02, atol=0)


def mixed(model, ids):
    with torch.autocast("cpu", torch.float16):
        return class_logits(model, ids)


@pytest.mark.parametrize("larger", [1, 2])
def test_float16_without_underflow_is_not_warned_of(wide_stream, larger):
    """Small gradients of few digits are counted."""
    model, batches = copy.deepcopy(wide_stream)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(larger)
    half = halved(model)
    with collected_fit_warnings() as said:
        found = collect_factors(half, class_logits, batches, rank=4)
    assert said == []
    assert slots(found) == slots(collect_factors(copy.deepcopy(half).float(), class_logits, batches, rank=4))


@pytest.mark.parametrize(("smallest", "warned"), [(2.0**-6, False), (2.0**-32, True)])
def test_autocast_with_outputs_in_float16_is_warned_of_where_they_underflow(smallest, warned):
    """A linear layer, whose output autocast keeps in float16. The first example decides the scale."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
    inputs = torch.randn(10, 8)
    factors = torch.full((10, 1), smallest)
    factors[0] = 1
    layers = find_linear_layers(model, "0")

    def logits_of(module, batch):
        with torch.autocast("cpu", torch.float16):
            logits = module(batch)
        return logits.float() * factors, None

    with tapped_batch(model, layers, logits_of, inputs) as tapped:
        tapped.taps.gradients(tapped.logits, torch.ones_like(tapped.logits, dtype=torch.float64))
        assert tapped.taps.smallest_gradient(0) > 0
    with collected_fit_warnings() as said:
        found = collect_factors(model, logits_of, [inputs], rank=3, layers=layers)
    if not warned:
        assert said == []
        assert slots(found) == [[10]]
    else:
        assert "routed tokens are too small for float16 and underflowed in part" in said[0]


def test_large_gradients_do_not_overflow(wide_stream):
    model, batches = wide_stream
    half = halved(model)
    with torch.no_grad():
        half.model.embed_tokens.weight.div_(1000)
        half.lm_head.weight.mul_(30)
    single = copy.deepcopy(half).float()
    with tapped_batch(half, find_expert_layers(half), class_logits, batches[0]) as tapped:
        tapped.taps.gradients(tapped.logits, torch.ones_like(tapped.logits))
        assert tapped.taps.scale.factor < 2**14  # the first was too large
    expected = collect_factors(single, class_logits, batches, rank=4)
    found = collect_factors(half, class_logits, batches, rank=4)
    assert slots(found) == slots(expected)
    for one, other in zip(found.layers, expected.layers, strict=True):
        torch.testing.assert_close(one.g_trace, other.g_trace, rtol=0.02, atol=0)


def test_small_weights_of_a_pass_are_scaled_up(wide_stream):
    model, batches = wide_stream
    half = halved(model)
    with tapped_batch(half, find_expert_layers(half), class_logits, batches[0]) as tapped:
        weights = torch.ones(4, 3, dtype=torch.float64)
        ones = tapped.taps.gradients(tapped.logits, weights)
        tiny = tapped.taps.gradients(tapped.logits, weights * 2.0**-40)
    for gradient, small in zip(ones, tiny, strict=True):
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, small * 2.0**40)


def test_gradients_that_overflow_at_every_scale_are_refused(wide_stream):
    model, batches = wide_stream
    half = halved(model)

    def steep(model, ids):
        logits, labels = class_logits(model, ids)
        logits.register_hook(lambda gradient: gradient * torch.inf)
        return logits, labels

    with pytest.raises(RuntimeError, match="overflow in float16; use bfloat16 or float32"):
        collect_factors(half, steep, batches)


def test_gradients_below_every_scale_are_counted(wide_stream):
    model, batches = wide_stream
    half = halved(model)

    def flat(model, ids):
        """The first example decides the scale, and the others are lost."""
        logits, labels = class_logits(model, ids)
        factors = torch.full((len(ids), 1), 2.0**-13, dtype=torch.float16)
        factors[0] = 1
        return logits * factors, labels

    with pytest.warns(UserWarning, match=r"gradients of \d+ of \d+ routed tokens are too small for float16"):
        collect_factors(half, flat, batches)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_other_dtypes_are_not_scaled(dtype):
    model = toy_model().to(dtype)
    with tapped_batch(model, find_expert_layers(model), answer_logits, toy_batch()) as tapped:
        gradients = tapped.taps.gradients(tapped.logits, torch.ones_like(tapped.logits))
        assert tapped.taps.scale is None
        assert all(gradient.dtype == dtype for gradient in gradients)
