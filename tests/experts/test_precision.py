"""Weights in half precision, and autocast, for every layout: factors and covariance stay close to those in float64."""

import copy

import pytest
import torch
from oracles.models import answer_logits, as_modules, tiny_qwen, toy_batch, toy_model
from oracles.own_models import Buffers, with_mixtures

from bmoe_lightning.curvature import collect_factors
from bmoe_lightning.experts import find_expert_layers, find_linear_layers
from bmoe_lightning.laplace import LaplacePosterior

BATCHES = [toy_batch(num_rows=4, seed=1), toy_batch(num_rows=3, seed=2)]


def built(layout):
    """A float64 model and the layers that get a posterior; a single expert, so that rounding changes no routing."""
    if layout == "registered":
        model = with_mixtures(Buffers)
    elif layout == "qwen":
        model = tiny_qwen(num_experts=2, num_experts_per_tok=2)
    else:
        model = toy_model(num_experts=2, top_k=2)
        model = as_modules(model) if layout == "modules" else model
    layers = find_linear_layers(model, "*.value") if layout == "linear" else find_expert_layers(model)
    return model, layers


def answers(model, layers, class_logits=answer_logits):
    factors = collect_factors(model, class_logits, BATCHES, rank=3, layers=layers)
    covariance = LaplacePosterior(factors).logit_covariance(model, class_logits, BATCHES[0])[1]
    return factors, covariance


def assert_close(found, exact, tolerance):
    """The factors are compared where they are large: trace and leading eigenvalue of every expert."""
    factors, covariance = found
    for layer, expected in zip(factors.layers, exact[0].layers, strict=True):
        assert {t.dtype for name, t in layer.tensors().items() if name.endswith(("basis", "eigenvalues"))} == {
            torch.float32
        }
        for name in ("a_trace", "g_trace"):
            torch.testing.assert_close(getattr(layer, name), getattr(expected, name), rtol=tolerance, atol=0)
        for name in ("a_eigenvalues", "g_eigenvalues"):
            torch.testing.assert_close(
                getattr(layer, name)[:, 0].double(), getattr(expected, name)[:, 0], rtol=tolerance, atol=0
            )
    scale = float(exact[1].diagonal(dim1=1, dim2=2).max())
    torch.testing.assert_close(covariance, exact[1], rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("layout", ["fused", "qwen", "modules", "linear", "registered"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.15), (torch.float16, 0.03), (torch.float32, 1e-4)])
def test_half_precision_weights(layout, dtype, tolerance):
    model, layers = built(layout)
    model = model.to(dtype)  # the exact model has the rounded weights too
    exact = answers(copy.deepcopy(model).double(), layers)
    found = answers(model, layers)
    assert_close(found, exact, tolerance)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


@pytest.mark.parametrize("layout", ["fused", "qwen", "modules", "linear", "registered"])
def test_autocast(layout):
    model, layers = built(layout)
    exact = answers(model, layers)

    def class_logits(m, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return answer_logits(m, batch)

    assert_close(answers(copy.deepcopy(model).float(), layers, class_logits), exact, 0.15)
