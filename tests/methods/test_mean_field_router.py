"""Mean-field routers as a method: untrained they are noise of the prior's scale, at its mean the model."""

from __future__ import annotations

import pytest
import torch
from methods_cases import predict
from oracles.models import answer_logits, split, toy_batch, toy_model

from bmoe_lightning.methods import MAP, MeanFieldRouter, RouterNoise, fit_methods

TRAINING, HELD_OUT = toy_batch(num_rows=6, seed=4), toy_batch(num_rows=30, seed=5)


@pytest.mark.parametrize("unit", ["gap", "one"])
def test_untrained_it_is_noise_of_the_prior_scale(unit):
    model = toy_model()
    method = MeanFieldRouter(num_samples=3, epochs=0, prior_scale=1.5, prior_unit=unit)
    noise = RouterNoise(num_samples=3, scales=(1.5,))
    fit = fit_methods([method, noise], model, answer_logits, [TRAINING], split(HELD_OUT, 20, 10))
    state = fit.state_of(method)
    sigma = 1.5 * (state["unit"] if unit == "gap" else torch.ones(2, dtype=torch.float64))
    expected = predict(noise, model, HELD_OUT, {**fit.state_of(noise), "sigma": sigma})
    torch.testing.assert_close(predict(method, model, HELD_OUT, state), expected, rtol=1e-9, atol=1e-9)
    mean = MeanFieldRouter(num_samples=0, epochs=0)
    assert torch.equal(predict(mean, model, HELD_OUT, state), predict(MAP(), model, HELD_OUT))
