"""Noise on routers as a method: its limits, its routes, and the fit of its scale."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from methods_cases import fitted, predict, predictions
from oracles.models import answer_logits, split, toy_batch, toy_model
from router_cases import OwnModule
from router_cases import batches as own_batches
from torch import nn

from bmoe_lightning.methods import MAP, BatchView, RouterNoise, fit_methods
from bmoe_lightning.methods.evaluation import evaluate
from bmoe_lightning.methods.routes import route_information
from bmoe_lightning.methods.storage import load_fit, save_fit
from bmoe_lightning.routers import FixedNoise, PositionNoise, find_routers, sampled_routes

SCORES = RouterNoise(name="of_scores", label="Of scores", average="scores")


def noise_state(*sigma, scale=1.0):
    found = torch.tensor(sigma, dtype=torch.float64)
    score = torch.zeros(len(sigma), dtype=torch.int64)
    return {"scale": torch.tensor(scale, dtype=torch.float64), "unit": found / scale, "sigma": found, "score": score}


NOISE = noise_state(0.7, 1.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", [RouterNoise(), SCORES])
def test_without_noise_it_is_bitwise_the_model(method, dtype, batches):
    model = toy_model().to(dtype)
    batch = {**batches[0]}
    expected = predict(MAP(), model, batch)
    assert torch.equal(predict(method, model, batch, noise_state(0.0, 0.0)), expected)


@pytest.mark.parametrize("per_pass", [1, 3, 5])
def test_averages_the_probabilities_along_its_routes(model, batches, per_pass):
    batch, probabilities = batches[0], []
    noise = PositionNoise(5)
    for sample in range(5):
        nets = map(FixedNoise, find_routers(model), (0.7, 1.5))
        with torch.no_grad(), sampled_routes(model, [*nets], [sample], noise):
            probabilities.append(answer_logits(model, batch)[0].softmax(-1))
    method = RouterNoise(num_samples=5, samples_per_pass=per_pass)
    view = BatchView(model, answer_logits, batch, seed=5)
    log_probs = method.log_probs(view, NOISE)
    routes = torch.stack(probabilities)
    torch.testing.assert_close(log_probs.exp(), routes.mean(0), rtol=1e-9, atol=1e-12)
    assert torch.equal(log_probs == -torch.inf, batch["absent"])
    assert (routes[0] - routes[1]).abs().max() > 1e-3
    information = method.uncertainty(view, NOISE)["mutual_information"]
    torch.testing.assert_close(information, route_information(routes.log()), rtol=1e-9, atol=1e-12)
    assert (information > 0).all()


def test_gates_of_a_network_of_the_users_own():
    module, data = OwnModule().eval(), list(own_batches(2))

    def class_logits(model, batch):
        return model.class_logits(batch)

    methods = [RouterNoise(num_samples=2)]
    fit = fit_methods(methods, module, class_logits, [], data)
    found = evaluate(methods, fit, module, class_logits, data)["router_noise"]
    assert found.log_probs.isfinite().all()


def test_predictions_and_scores_of_uncertainty_share_their_passes(model, batches):
    calls = []

    def counted(model, batch):
        calls.append(batch)
        return answer_logits(model, batch)

    method = RouterNoise(num_samples=4)
    evaluate([method], fitted((method, NOISE)), model, counted, batches[:1])
    assert len(calls) == 1 + 4


def test_an_average_of_scores_is_one_pass(model, batches):
    calls = []

    def counted(model, batch):
        calls.append(batch)
        return answer_logits(model, batch)

    of_scores = SCORES.log_probs(BatchView(model, counted, batches[0]), NOISE)
    assert len(calls) == 1
    assert not torch.allclose(of_scores, predict(RouterNoise(), model, batches[0], NOISE))
    assert SCORES.uncertainty(BatchView(model, counted, batches[0]), NOISE) == {}


@pytest.mark.parametrize("method", [RouterNoise(num_samples=3), SCORES])
def test_an_example_gets_the_same_probabilities_in_any_batch(model, method):
    batch = toy_batch(num_rows=4)
    state = torch.get_rng_state()
    whole = predict(method, model, batch, NOISE)
    rows = torch.cat([predict(method, model, row, NOISE) for row in split(batch, 1, 1, 1, 1)])
    torch.testing.assert_close(rows, whole, rtol=0, atol=1e-9)
    assert torch.equal(predict(method, model, batch, NOISE), whole)
    assert not torch.allclose(predict(method, model, batch, NOISE, seed=1), whole)
    assert torch.equal(torch.get_rng_state(), state)


def test_other_methods_of_the_same_batch_see_no_noise(model, batches):
    method = RouterNoise(num_samples=2)
    for methods in ([method, MAP()], [MAP(), method]):
        found = predictions(model, batches, *methods, fit=fitted((method, NOISE), (MAP(), {})))
        assert torch.equal(found["map"].log_probs, predictions(model, batches, MAP())["map"].log_probs)


def test_leaves_nothing_behind_after_an_exception(model, batches):
    def failing(model, batch):
        answer_logits(model, batch)
        raise OSError("stop")

    before = answer_logits(model, batches[0])[0]
    with pytest.raises(OSError, match="stop"):
        RouterNoise().log_probs(BatchView(model, failing, batches[0]), NOISE)
    assert torch.equal(answer_logits(model, batches[0])[0], before)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


class TestFit:
    @pytest.fixture(scope="class")
    def confident(self):
        """A model that is too sure, and questions whose labels are drawn from flatter probabilities."""
        model, batch = toy_model(), toy_batch(num_rows=60, seed=4)
        with torch.no_grad():
            logits = answer_logits(model, batch)[0]
        generator = torch.Generator().manual_seed(0)
        batch["labels"] = torch.multinomial((logits / 3).softmax(-1), 1, generator=generator).squeeze(1)
        return model, batch

    @pytest.mark.parametrize("method", [RouterNoise(num_samples=4, scales=[1, 3]), replace(SCORES, num_samples=4)])
    def test_the_scale_has_the_least_loss_of_the_candidates(self, confident, method, tmp_path):
        model, batch = confident
        fit = fit_methods([method], model, answer_logits, [], split(batch, 30, 30))
        state = fit.state_of(method)
        assert torch.equal(state["sigma"], state["scale"] * state["unit"])
        losses = {}
        for scale in (0.0, *method.scales):
            candidate = {**state, "sigma": scale * state["unit"]}
            log_probs = predict(method, model, batch, candidate)
            losses[scale] = float(torch.nn.functional.nll_loss(log_probs, batch["labels"]))
        assert float(state["scale"]) == min(losses, key=losses.get)
        save_fit(tmp_path, fit)
        loaded = load_fit(tmp_path)[0].state_of(method)
        assert torch.equal(predict(method, model, batch, loaded), predict(method, model, batch, state))
        method.check_state(loaded)

    def test_the_unit_is_the_median_gap_of_real_tokens(self, confident):
        model, batch = confident
        gaps = {}

        def record(router):
            def hook(_module, _args, output):
                values = output[batch["mask"].bool().flatten()].sort(-1, descending=True).values
                gaps[router.index] = float((values[:, 1] - values[:, 2]).median())

            return hook

        handles = [model.get_submodule(r.name).register_forward_hook(record(r)) for r in find_routers(model)]
        with torch.no_grad():
            answer_logits(model, batch)
        for handle in handles:
            handle.remove()
        method = RouterNoise(num_samples=2, scales=(1.0,))
        state = fit_methods([method], model, answer_logits, [], split(batch, 30, 30)).state_of(method)
        assert state["unit"].tolist() == pytest.approx([gaps[0], gaps[1]], rel=0.02)

    def test_noise_in_some_layers_alone(self, confident):
        model, batch = confident
        method = RouterNoise(num_samples=4, scales=(2.0,), layers=(1,))
        everywhere = replace(method, layers=(), name="everywhere", label="Everywhere")
        fit = fit_methods([everywhere, method], model, answer_logits, [], split(batch, 30, 30))
        state, of_all = fit.state_of(method), fit.state_of(everywhere)
        assert state["unit"].tolist() == [0.0, float(of_all["unit"][1])]
        assert float(state["sigma"][1]) > 0
        noise, routes = PositionNoise(5), []
        for sample in range(4):
            nets = [FixedNoise(find_routers(model)[1], float(state["sigma"][1]))]
            with torch.no_grad(), sampled_routes(model, nets, [sample], noise):
                routes.append(answer_logits(model, batch)[0].softmax(-1))
        view = BatchView(model, answer_logits, batch, seed=5)
        found = method.log_probs(view, state)
        torch.testing.assert_close(found.exp(), torch.stack(routes).mean(0), rtol=1e-9, atol=1e-12)
        assert not torch.allclose(found, everywhere.log_probs(view, of_all))
        with pytest.raises(ValueError, match="names 7, and the model has the routers 0 to 1"):
            replace(method, layers=(7,)).check_run(model, None)

    def test_no_noise_is_said(self, confident):
        model, batch = confident
        with torch.no_grad():
            batch = {**batch, "labels": answer_logits(model, batch)[0].argmax(1)}
        method = RouterNoise(num_samples=2, scales=(1.0,))
        fit = fit_methods([method], model, answer_logits, [], [batch])
        assert float(fit.state_of(method)["scale"]) == 0
        assert any("fitted as 0" in sentence for sentence in fit.warnings_of(method))

    def test_data_that_can_be_read_once_are_refused(self, confident):
        model, batch = confident
        with pytest.raises(ValueError, match="only once"):
            fit_methods([RouterNoise()], model, answer_logits, [], iter([batch]))


def test_a_model_without_routers_is_refused():
    with pytest.raises(ValueError, match="expert"):
        RouterNoise().check_run(nn.Linear(2, 2), None)


def test_other_routers_than_those_of_the_fit_are_refused(model, batches):
    with pytest.raises(ValueError, match="fitted to 3 routers, and ToyMoE has 2"):
        predict(RouterNoise(), model, batches[0], noise_state(1.0, 1.0, 1.0))


def test_copies_that_depend_on_more_than_their_row_are_refused(model, batches):
    def hiding(model, batch):
        logits, labels = answer_logits(model, batch)
        return logits.index_fill(1, torch.tensor([2]), -torch.inf) if len(logits) > 6 else logits, labels

    method = RouterNoise(num_samples=2, samples_per_pass=2)
    with pytest.raises(ValueError, match="compute one sample in a pass"):
        method.log_probs(BatchView(model, hiding, batches[0]), NOISE)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"average": "logits"}, "valid are predictions, scores"),
        ({"average": "scores"}, "give it a name and a label"),
        ({"num_samples": 0}, "at least one sample"),
        ({"scales": ()}, "positive numbers"),
        ({"scales": (1.0, -1.0)}, "positive numbers"),
    ],
)
def test_refused_options(options, found):
    with pytest.raises(ValueError, match=found):
        RouterNoise(**options)


@pytest.mark.parametrize(
    "change",
    [
        {"sigma": -NOISE["sigma"]},
        {"sigma": 2 * NOISE["sigma"]},
        {"scale": 0 * NOISE["scale"]},
        {"score": NOISE["score"] + 3},
        {"score": NOISE["score"].double()},
        {"unit": None},
    ],
)
def test_a_state_of_no_fit_is_refused(change):
    state = {key: value for key, value in {**NOISE, **change}.items() if value is not None}
    with pytest.raises(ValueError, match="must"):
        RouterNoise().check_state(state)
