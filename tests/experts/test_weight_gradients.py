"""Squared norms of gradients: those that autograd writes out, while the model is left as it was."""

from __future__ import annotations

import threading
import weakref

import pytest
import torch
from oracles.models import answer_logits, tiny_qwen, toy_batch, toy_model
from torch import nn

from bmoe_lightning.experts.weight_gradients import squared_gradients


def expected(outputs, weights, parameters):
    found = torch.autograd.grad(outputs, parameters, weights, retain_graph=True, materialize_grads=True)
    return torch.stack([gradient.double().square().sum() for gradient in found])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 1e-5)])
def test_are_those_of_written_out_gradients(dtype, tolerance):
    model = tiny_qwen(dtype=dtype)
    logits, _ = answer_logits(model, toy_batch())
    weights, parameters = torch.linspace(-1, 1, logits.numel()).view(logits.shape).to(dtype), list(model.parameters())
    found = squared_gradients(logits, weights, parameters)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected(logits, weights, parameters), rtol=tolerance, atol=0)


def test_embeddings_and_weights_that_are_used_twice_or_never():
    words = nn.Embedding(7, 3, sparse=True)
    twice, never = nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.randn(2))
    offset = nn.Parameter(torch.tensor(0.3))
    outputs = words(torch.tensor([1, 5, 1])) @ twice @ twice + offset
    parameters = [words.weight, twice, never, offset]
    found = squared_gradients(outputs, torch.ones_like(outputs), parameters)
    dense = nn.functional.embedding(torch.tensor([1, 5, 1]), words.weight) @ twice @ twice + offset
    torch.testing.assert_close(found, expected(dense, torch.ones_like(dense), parameters), rtol=1e-5, atol=0)
    assert found[2] == 0


def test_nothing_is_left_behind():
    model = toy_model()
    parameters = list(model.parameters())
    watched, stored = parameters[0], parameters[1]
    stored.grad = torch.ones_like(stored)
    calls, accumulated = [], []
    handle = watched.register_hook(lambda gradient: calls.append(gradient.shape))
    stored.register_post_accumulate_grad_hook(accumulated.append)
    logits, _ = answer_logits(model, toy_batch())
    squared_gradients(logits, torch.ones_like(logits), parameters)
    assert calls == []  # of the user's own hook on the gradient
    assert accumulated == []
    assert torch.equal(stored.grad, torch.ones_like(stored))
    assert [p.grad is None for p in parameters] == [p is not stored for p in parameters]
    assert [p._backward_hooks is None for p in parameters] == [p is not watched for p in parameters]
    logits.sum().backward(retain_graph=True)
    assert len(calls) == 1
    handle.remove()
    logits.sum().backward()
    assert len(calls) == 1
    assert float(parameters[2].grad.abs().sum()) > 0


def test_no_gradient_outlives_its_norm(monkeypatch):
    # Each parameter's gradient is freed before that of the layer below is computed.
    layers = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(6)))
    alive, most = set(), []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, weight):
            return weight.view_as(weight)

        @staticmethod
        def backward(ctx, gradient):
            copy = gradient.clone()
            alive.add(id(copy))
            weakref.finalize(copy, alive.discard, id(copy))
            most.append(len(alive))
            return copy

    x = torch.randn(3, 64)
    for layer in layers:
        x = x @ Watched.apply(layer.weight).T
    squared_gradients(x, torch.ones_like(x), list(layers.parameters()))
    assert max(most) <= 2


def test_a_backward_pass_of_another_thread_is_not_seen():
    weight, other = nn.Parameter(torch.randn(3, 3)), []

    class Meanwhile(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            def train():
                (weight * 100).sum().backward()
                other.append(weight.grad.clone())

            thread = threading.Thread(target=train)
            thread.start()
            thread.join()
            return gradient

    outputs = Meanwhile.apply(torch.ones(2, 3) @ weight)
    found = squared_gradients(outputs, torch.ones_like(outputs), [weight])
    torch.testing.assert_close(float(found), 9 * 4.0)
    assert torch.equal(other[0], torch.full((3, 3), 100.0))
