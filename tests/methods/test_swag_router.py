"""SWAG routers: the collected weights against those of a run on the model itself, and refusals."""

from __future__ import annotations

import pytest
import torch
from methods_cases import predict
from weight_router_cases import fit, labelled, opposed, probabilities, sgd, swapped, trained_shifts

from bmoe_lightning.methods import SWAGRouter
from bmoe_lightning.methods.storage import load_fit, save_fit
from bmoe_lightning.routers import PositionNoise, SwagWeights, find_routers


def test_its_moments_are_those_of_weights_along_a_run_of_sgd(model, tmp_path):
    train = labelled(model, 8, 8, 5)
    method = SWAGRouter(epochs=4, collections=5, rank=3, learning_rate=0.5, num_samples=4)
    found, state = fit(method, model, train, train)
    steps = trained_shifts(model, 4 * [train], sgd, lambda *_: 0.5)
    assert len(steps) == 12
    moments = [
        SwagWeights.of_collected(torch.stack([steps[after - 1][index] for after in (2, 5, 7, 10, 12)]), 3)
        for index in range(2)
    ]
    for index, expected in enumerate(moments):
        for name in ("variance", "deviations"):
            torch.testing.assert_close(state[f"net.{index}.{name}"], getattr(expected, name), rtol=1e-6, atol=1e-12)
        torch.testing.assert_close(state[f"net.{index}.mean_shift"], expected.mean, rtol=1e-6, atol=1e-9)
    routes, noise = [], PositionNoise(7)
    for sample in range(4):
        drawn = [
            expected.sample(noise.shared(router, [sample], expected.noise_width))[0]
            for router, expected in zip(find_routers(model), moments, strict=True)
        ]
        routes.append(probabilities(swapped(model, drawn), train[0]))
    log_probs = predict(method, model, train[0], state, seed=7)
    torch.testing.assert_close(log_probs.exp(), torch.stack(routes).mean(0), rtol=1e-6, atol=1e-9)
    assert (routes[0] - routes[1]).abs().max() > 1e-4
    save_fit(tmp_path, found)
    assert torch.equal(predict(method, model, train[0], load_fit(tmp_path)[0].state_of(method), seed=7), log_probs)


def test_fewer_steps_than_collections_are_said_and_less_than_two_refused(model):
    train = labelled(model, 8, 8)
    method = SWAGRouter(epochs=2, num_samples=2)
    found, state = fit(method, model, train, train)
    assert len(state["net.0.deviations"]) == 4
    assert any("are collected 4 times and not 20" in sentence for sentence in found.warnings_of(method))
    with pytest.raises(ValueError, match="at least 2 steps, and training has 1"):
        fit(SWAGRouter(epochs=1, num_samples=2), model, train[:1], train)


def test_routers_that_are_worse_than_the_model_are_said(model):
    train, wrong = opposed(model, 8, 8)
    method = SWAGRouter(epochs=3, num_samples=2, learning_rate=5.0)
    found, state = fit(method, model, wrong, train)
    assert any("higher NLL on the held-out labels than the model" in one for one in found.warnings_of(method))
    numbers, own = method.hyperparameters(state), predict(method, model, train[0], state)
    assert numbers["held_out_nll"] > numbers["held_out_nll_untrained"]
    assert own.isfinite().all()


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"collections": 1}, "at least twice"),
        ({"rank": 1}, "at least twice"),
        ({"epochs": 0}, "at least twice"),
        ({"average": "scores"}, "give it a name and a label"),
        ({"learning_rate": 0.0}, "positive learning rate"),
    ],
)
def test_refused_options(options, found):
    with pytest.raises(ValueError, match=found):
        SWAGRouter(**options)
