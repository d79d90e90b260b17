"""Modes and flags of a model, set for a while."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from bmoe_lightning.experts.model_state import evaluation_mode, frozen_parameters
from bmoe_lightning.experts.threads import model_lock


def test_evaluation_mode_restores_each_module():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()))
    model[1].eval()
    with evaluation_mode(model):
        assert not any(m.training for m in model.modules())
    assert [m.training for m in model.modules()] == [True, True, False, False]


class TestTrainingBesideAPrediction:
    """Forward passes of another thread while no parameter requires gradients."""

    @pytest.fixture
    def model(self):
        return nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))

    @pytest.fixture
    def other(self):
        with ThreadPoolExecutor(1) as pool:
            yield lambda action: pool.submit(action).result()

    IDS = torch.arange(5)

    def gradients(self, model):
        return [torch.zeros(0) if p.grad is None else p.grad.clone() for p in model.parameters()]

    def test_a_backward_pass_of_partial_gradients_is_refused(self, model, other):
        model(self.IDS).sum().backward()
        expected = self.gradients(model)
        model.zero_grad()
        with frozen_parameters(model):
            half = other(lambda: model[:2](self.IDS))
        # The rest of the forward pass comes when the parameters require gradients again.
        loss = other(lambda: model[2:](half).sum())
        with pytest.raises(RuntimeError, match=r"while another thread predicted with it.*hold .*model_lock"):
            other(loss.backward)
        model.zero_grad()

        def step():
            with model_lock(model):
                model(self.IDS).sum().backward()

        other(step)
        assert all(torch.equal(found, right) for found, right in zip(self.gradients(model), expected, strict=True))

    @pytest.fixture(params=["embedding", "no embedding", "experts alone"])
    def any_model(self, request, model):
        if request.param == "no embedding":
            model = nn.Sequential(nn.Linear(1, 4), *model[1:])
        if request.param == "experts alone":
            model[:1].requires_grad_(False)
        return model, self.IDS if request.param != "no embedding" else torch.ones(5, 1)

    @pytest.mark.parametrize("before", [1, 2, 3])
    @pytest.mark.parametrize("within", [1, 2, 3])
    def test_wherever_the_forward_pass_overlaps(self, any_model, other, before, within):
        """It has its first modules before the prediction, some within and the others after it."""
        model, ids = any_model
        before, within = (before, 4) if before + within > 4 else (before, before + within)
        half = other(lambda: model[:before](ids))
        with frozen_parameters(model):
            half = other(lambda: model[before:within](half))
        loss = other(lambda: model[within:](half).sum())
        used = any(p.requires_grad for p in model[before:within].parameters())
        if used:
            with pytest.raises(RuntimeError, match="while another thread predicted with it"):
                other(loss.backward)
        else:
            other(loss.backward)
            assert all(p.grad is not None for p in model.parameters() if p.requires_grad)

    def test_a_backward_pass_meanwhile_is_refused(self, any_model, other):
        model, ids = any_model
        loss = other(lambda: model(ids).sum())
        with frozen_parameters(model), pytest.raises(RuntimeError, match=r"backward pass .* while another thread"):
            other(loss.backward)

    def test_steps_before_and_after_are_not(self, any_model, other):
        model, ids = any_model
        loss = other(lambda: model(ids).sum())
        with frozen_parameters(model):
            model(ids)
        other(loss.backward)
        expected = self.gradients(model)
        model.zero_grad()
        other(lambda: model(ids).sum().backward())
        assert all(torch.equal(found, right) for found, right in zip(self.gradients(model), expected, strict=True))
        assert sum(len(found) > 0 for found in expected) == sum(p.requires_grad for p in model.parameters())
        assert not any(module._forward_hooks for module in model.modules())

    def test_a_plain_forward_pass_may_write_in_place(self, other):
        model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(inplace=True), nn.Linear(2, 2))
        with frozen_parameters(model):
            assert other(lambda: model(torch.ones(3, 2))).requires_grad

    @pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad, torch.inference_mode])
    def test_a_plain_forward_pass_is_not(self, model, other, context):
        def forward():
            with context():
                return model(self.IDS)

        expected = forward()
        with frozen_parameters(model):
            found = other(forward)
        assert torch.equal(found, expected)
        assert found.requires_grad == expected.requires_grad

    def test_a_model_that_is_not_trained_gets_no_graph(self, model, other):
        model.requires_grad_(False)
        with frozen_parameters(model):
            assert not other(lambda: model(self.IDS)).requires_grad

    def test_this_thread_has_no_graph_from_embeddings(self, model):
        model[0].register_forward_hook(lambda module, inputs, output: output.requires_grad_())
        with frozen_parameters(model):
            assert not model[0](self.IDS).requires_grad
        assert model[0](self.IDS).requires_grad
        assert all(p.requires_grad for p in model.parameters())
