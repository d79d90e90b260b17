"""Temperature routers as a method: drawn experts, and the models whose routers cannot draw them."""

from __future__ import annotations

import pytest
import torch
from methods_cases import predict
from oracles.models import answer_logits, tiny_qwen, toy_batch, toy_model

from bmoe_lightning.methods import MAP, BatchView, TemperatureRouter, fit_methods
from bmoe_lightning.methods.routes import probed_routers

HELD_OUT = toy_batch(num_rows=30, seed=5)


@pytest.mark.parametrize("normalised", [False, True])
def test_it_draws_the_experts_in_both_kinds_of_families(normalised):
    model = tiny_qwen(norm_topk_prob=normalised)
    method = TemperatureRouter(num_samples=2, epochs=1)
    paper = TemperatureRouter(num_samples=1, epochs=0, average="scores", name="paper", label="Paper")
    fit = fit_methods([method, paper], model, answer_logits, [HELD_OUT], [HELD_OUT])
    state = fit.state_of(method)
    assert bool(state["way"]) == (not normalised)
    assert ("gate_temperature" in state) == (int(state["epoch"]) > 0)
    view = BatchView(model, answer_logits, HELD_OUT)
    scores = method.uncertainty(view, state)
    assert set(scores) == {"mutual_information", "router_gate_entropy"}
    assert not torch.allclose(method.log_probs(view, state), predict(MAP(), model, HELD_OUT), atol=1e-3)
    # One pass with one draw, as in the papers, is the first route of the average.
    route = TemperatureRouter(num_samples=1, epochs=0)
    expected = predict(route, model, HELD_OUT, fit.state_of(paper))
    torch.testing.assert_close(predict(paper, model, HELD_OUT, fit.state_of(paper)), expected, rtol=1e-5, atol=1e-5)


def test_a_gate_that_cannot_return_a_choice_is_refused_before_training():
    model = toy_model()
    view = BatchView(model, answer_logits, HELD_OUT)
    with pytest.raises(ValueError, match="are not chosen"):
        TemperatureRouter().check_routers(model, probed_routers(view), lambda: view.forward()[0])
    qwen = tiny_qwen()
    view = BatchView(qwen, answer_logits, HELD_OUT)
    TemperatureRouter().check_routers(qwen, probed_routers(view), lambda: view.forward()[0])


def test_a_temperature_that_would_get_no_gradient_is_refused():
    with pytest.raises(ValueError, match="score_function=True"):
        TemperatureRouter(temper_weights=False)
    assert TemperatureRouter(temper_weights=False, score_function=True).training_options.score_function
