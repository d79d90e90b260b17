"""Log-probabilities along routes, and what is checked of a model's routers before them."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
from oracles.models import answer_logits, toy_batch, toy_model
from torch import nn

from bmoe_lightning.methods import BatchView
from bmoe_lightning.methods.routes import probed_routers, route_information, route_log_probs


def test_information_is_that_of_label_and_route():
    one, other = torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([[0.0, 1.0], [0.5, 0.5]])
    routes = torch.stack([one, other]).double().log()
    torch.testing.assert_close(route_information(routes), torch.tensor([math.log(2), 0.0]).double())


def test_samples_are_asked_for_in_order():
    asked = []

    def routes(samples):
        asked.append(list(samples))
        return nullcontext()

    view = BatchView(toy_model(), answer_logits, toy_batch(num_rows=3))
    found = route_log_probs(view, routes, 5, per_pass=2)
    assert asked == [[0, 1], [2, 3], [4]]
    torch.testing.assert_close(found, view.logits.log_softmax(-1).expand(5, -1, -1))


def test_routers_are_probed_on_the_batch():
    found = probed_routers(BatchView(toy_model(top_k=3), answer_logits, toy_batch()))
    assert [(router.top_k, router.score) for router in found] == [(3, "softmax")] * 2


def test_tokens_whose_rows_are_unknown_are_refused():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = toy_model().layers

        def forward(self, *, embedded):
            for block in self.blocks:
                embedded = block(embedded, torch.ones(5, 5, dtype=torch.bool).tril())
            return embedded

    def class_logits(model, batch):
        return model(embedded=batch["x"])[:, -1, :4], None

    batch = {"x": torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)}
    with pytest.raises(ValueError, match="the padding among them is not known"):
        probed_routers(BatchView(Own().eval(), class_logits, batch))
