"""Fine-tuned routers: their training against that of the weights themselves, the choice of the epoch, and refusals."""

from __future__ import annotations

import pytest
import torch
from methods_cases import predict
from weight_router_cases import (
    adamw,
    adamw_rate,
    fit,
    labelled,
    opposed,
    probabilities,
    swapped,
    trained_shifts,
)

from bmoe_lightning.methods import MAP, BatchView, FineTunedRouter
from bmoe_lightning.methods.storage import load_fit, save_fit


@pytest.mark.parametrize("layers", [(), (1,), ("layers.1.mixture.router",)])
def test_it_is_the_model_with_fine_tuned_router_weights(model, tmp_path, layers):
    train = labelled(model, 8, 8, 5)
    method = FineTunedRouter(layers=layers, epochs=3, learning_rate=0.02)
    found, state = fit(method, model, train, train)
    assert int(state["epoch"]) == 3
    indices = (1,) if layers else (0, 1)
    expected = trained_shifts(model, 3 * [train], adamw, adamw_rate(0.02), indices)[-1]
    for index, shift in zip(indices, expected, strict=True):
        torch.testing.assert_close(state[f"net.{index}.shift"], shift, rtol=1e-7, atol=1e-10)
    assert {name for name in state if name.startswith("net.")} == {f"net.{index}.shift" for index in indices}
    log_probs = predict(method, model, train[0], state)
    tuned = probabilities(swapped(model, expected, indices), train[0])
    torch.testing.assert_close(log_probs.exp(), tuned, rtol=1e-7, atol=1e-9)
    assert not torch.allclose(tuned, probabilities(model, train[0]), atol=1e-3)
    assert list(method.uncertainty(_view(model, train[0]), state)) == ["router_gate_entropy"]
    save_fit(tmp_path, found)
    assert torch.equal(predict(method, model, train[0], load_fit(tmp_path)[0].state_of(method)), log_probs)


def _view(model, batch):
    from oracles.models import answer_logits

    return BatchView(model, answer_logits, batch)


def test_without_an_epoch_that_helps_it_is_the_model(model):
    train, wrong = opposed(model, 8, 8)
    method = FineTunedRouter(epochs=2, learning_rate=0.1)
    found, state = fit(method, model, wrong, train)
    assert float(state["epoch"]) == 0
    assert torch.equal(predict(method, model, train[0], state), predict(MAP(), model, train[0]))
    assert any("so they are the model's own" in sentence for sentence in found.warnings_of(method))
    numbers = method.hyperparameters(state)
    assert numbers["held_out_nll"] == numbers["held_out_nll_untrained"]


def test_routers_of_other_weights_are_refused(model):
    train = labelled(model, 8, 8)
    method = FineTunedRouter(epochs=1)
    _, state = fit(method, model, train, train)
    model.layers[0].mixture.router.weight.data += 0.1
    with pytest.raises(ValueError, match="are not those beside which"):
        predict(method, model, train[0], state)


@pytest.mark.parametrize("options", [{"epochs": -1}, {"learning_rate": 0.0}])
def test_refused_options(options):
    with pytest.raises(ValueError, match="epochs >= 0 and a positive learning rate"):
        FineTunedRouter(**options)
    assert not {"num_samples", "average", "antithetic"} & FineTunedRouter().options().keys()
