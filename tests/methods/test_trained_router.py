"""What methods with trained routers share: their predictions, scores of uncertainty, warnings and refusals."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace

import pytest
import torch
from methods_cases import predict
from oracles.models import answer_logits, split, toy_batch, toy_model

from bmoe_lightning.methods import (
    MAP,
    BatchView,
    FineTunedRouter,
    FullCovarianceRouter,
    LaplaceRouterNoise,
    MCDropoutRouter,
    MeanFieldRouter,
    RouterNoise,
    SWAGRouter,
    TemperatureRouter,
    fit_methods,
)
from bmoe_lightning.methods.router_method import RouterMethod
from bmoe_lightning.methods.router_training import RouterPasses, RouterTrainingResult
from bmoe_lightning.methods.routing_cost import routing_cost
from bmoe_lightning.methods.storage import load_fit, save_fit
from bmoe_lightning.routers import (
    BayesianRouters,
    PositionNoise,
    RouterOptions,
    find_routers,
    router_state,
    sampled_routes,
)

TRAINING, HELD_OUT = toy_batch(num_rows=12, seed=4), toy_batch(num_rows=30, seed=5)
METHOD = MeanFieldRouter(num_samples=2, epochs=2, learning_rate=0.02)


def fit(method=METHOD, model=None, **data):
    data = {"training": split(TRAINING, 6, 6), "calibration": [HELD_OUT]} | data
    return fit_methods([method], toy_model() if model is None else model, answer_logits, **data)


@pytest.fixture(scope="module")
def trained():
    """Held-out labels that the routers are trained on, so that training helps."""
    return fit(replace(METHOD, epochs=4), training=split(HELD_OUT, 10, 10, 10))


def test_held_out_labels_choose_the_epoch(trained, tmp_path):
    method = replace(METHOD, epochs=4)
    state = trained.state_of(method)
    losses = state["held_out_nll"]
    assert losses.shape == (5,)
    assert int(state["epoch"]) == int(losses.argmin()) > 0
    found = torch.nn.functional.nll_loss(predict(method, toy_model(), HELD_OUT, state), HELD_OUT["labels"])
    torch.testing.assert_close(found, losses.min())
    numbers = method.hyperparameters(state)
    assert numbers["held_out_nll"] < numbers["held_out_nll_untrained"]
    assert 0.1 < numbers["scale_ratio"] < 3
    assert [numbers[f"prior_scale_{index}"] for index in (0, 1)] == pytest.approx(
        [2 * u for u in state["unit"].tolist()]
    )
    save_fit(tmp_path, trained)
    loaded = load_fit(tmp_path)[0].state_of(method)
    method.check_state(loaded)
    assert torch.equal(predict(method, toy_model(), HELD_OUT, loaded), predict(method, toy_model(), HELD_OUT, state))


@pytest.mark.parametrize(
    "method",
    [
        replace(METHOD, num_samples=16, epochs=1),
        SWAGRouter(epochs=2),
        MCDropoutRouter(rates=(0.3,)),
        MCDropoutRouter(rates=(0.3,), epochs=1),
    ],
    ids=["mean field", "SWAG", "dropout", "trained dropout"],
)
def test_a_row_at_the_mean_has_the_routers_of_the_row_of_samples(method, monkeypatch):
    calls = []
    predicted = RouterMethod.predicted
    monkeypatch.setattr(RouterMethod, "predicted", lambda *args: (calls.append(args[0].name), predicted(*args))[1])
    at_mean = replace(method, num_samples=0, name="at_mean", label="At the mean")
    data = {"training": split(TRAINING, 6, 6), "calibration": [HELD_OUT]}
    both = fit_methods([method, at_mean], toy_model(), answer_logits, **data)
    assert set(calls) == {method.name}  # the held-out data are predicted once
    alone = fit_methods([at_mean], toy_model(), answer_logits, **data)
    expected = both.state_of(method)
    for state in (both.state_of(at_mean), alone.state_of(at_mean)):
        assert state.keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in state.items())


@dataclass(frozen=True)
class Flat(FineTunedRouter):
    """Predicts otherwise than its base, with routers that are trained alike."""

    name: str = "flat"
    label: str = "Flat"

    def predicted(self, batch, nets, sampling=None):
        return (super().predicted(batch, nets, sampling) / 3).log_softmax(-1)


def test_methods_that_share_a_training_and_predict_otherwise_choose_by_their_own_predictions():
    plain, flat = FineTunedRouter(epochs=2), Flat(epochs=2)
    data = {"training": split(TRAINING, 6, 6), "calibration": [HELD_OUT]}
    both = fit_methods([plain, flat], toy_model(), answer_logits, **data)
    alone = fit_methods([flat], toy_model(), answer_logits, **data)
    found = both.state_of(flat)["held_out_nll"]
    assert torch.equal(found, alone.state_of(flat)["held_out_nll"])
    assert not torch.equal(found, both.state_of(plain)["held_out_nll"])


def test_means_scores_and_predictions_differ(trained):
    state, model = trained.state_of(replace(METHOD, epochs=4)), toy_model()
    methods = [METHOD, replace(METHOD, num_samples=0), replace(METHOD, average="scores", name="s", label="S"), MAP()]
    found = [predict(method, model, HELD_OUT, state) for method in methods]
    assert all(not torch.allclose(a, b, atol=1e-4) for i, a in enumerate(found) for b in found[:i])


@pytest.mark.parametrize("average", ["predictions", "scores"])
def test_scores_of_uncertainty(trained, average):
    state = trained.state_of(replace(METHOD, epochs=4))
    method = replace(METHOD, average=average, name="other", label="Other")
    view = BatchView(toy_model(), answer_logits, HELD_OUT)
    scores = method.uncertainty(view, state)
    names = {"router_logit_variance", "router_gate_entropy"}
    assert set(scores) == names | ({"mutual_information"} if average == "predictions" else set())
    for name in names:
        assert scores[name].shape == (30,)
        assert (scores[name] > 0).all()
        assert scores[name].std() > 0


def test_noise_that_training_does_not_improve_is_said():
    method = replace(METHOD, learning_rate=1e-300)
    found = fit(method)
    assert int(found.state_of(method)["epoch"]) == 0
    assert any("better than untrained noise" in sentence for sentence in found.warnings_of(method))


@pytest.mark.parametrize(("ratio", "said"), [(0.05, True), (0.5, False)])
def test_noise_that_shrinks_is_said(monkeypatch, ratio, said):
    def train(self, key, nets, options, predict, *, predict_key=None):
        return RouterTrainingResult(router_state(nets), 1, (1.0, 0.9), {"scale_ratio": (ratio, ratio)})

    monkeypatch.setattr(RouterPasses, "train", train)
    assert any("has shrunk" in sentence for sentence in fit().warnings_of(METHOD)) == said


def test_some_layers_are_random():
    method = replace(METHOD, layers=("layers.1.mixture.router",))
    state = fit(method).state_of(method)
    assert {name.split(".")[1] for name in state if name.startswith("net.")} == {"1"}
    by_index = replace(method, layers=[1])
    assert torch.equal(fit(by_index).state_of(by_index)["net.1.shift"], state["net.1.shift"])
    with pytest.raises(ValueError, match="names 2, and the model has the routers 0 to 1"):
        replace(METHOD, layers=(2,)).check_run(toy_model(), None)


def test_routers_of_other_weights_are_refused(trained):
    state, model = trained.state_of(replace(METHOD, epochs=4)), toy_model()
    predict(METHOD, model, HELD_OUT, state)
    with torch.no_grad():
        model.layers[0].mixture.router.weight[0] += 1
    with pytest.raises(ValueError, match="load the checkpoint that they belong to"):
        predict(METHOD, model, HELD_OUT, state)
    with pytest.raises(ValueError, match="fitted to 2 routers, and ToyMoE has 1"):
        predict(METHOD, toy_model(num_layers=1), HELD_OUT, state)


def test_training_data_that_can_be_read_once_are_refused():
    with pytest.raises(ValueError, match="only once"):
        fit(training=iter([TRAINING]))


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"epochs": -1}, "epochs >= 0"),
        ({"learning_rate": 0.0}, "positive learning rate"),
        ({"learning_rate": math.inf}, "positive learning rate"),
        ({"beta": -1.0}, "beta >= 0"),
        ({"beta": math.inf}, "beta >= 0"),
        ({"num_samples": -1}, "at least one sample"),
        ({"prior_scale": 0.0}, "positive number"),
        ({"prior_unit": "two"}, "valid are gap, one"),
        ({"average": "scores"}, "name='mean_field_router_scores'"),
    ],
)
def test_refused_options(options, found):
    with pytest.raises(ValueError, match=found):
        MeanFieldRouter(**options)


@pytest.mark.parametrize(
    "change",
    [
        {"score": None},
        {"score": torch.tensor([0.0, 0.0])},
        {"fingerprint": torch.zeros(3)},
        {"top_k": None},
        {"top_k": torch.tensor([2, 5])},
        {"top_k": torch.tensor([-1, 2])},
        {"sizes": torch.tensor([[4, 16], [-4, 16]])},
        {"way": torch.tensor(0.7)},
        {"held_out_nll": torch.ones(1, dtype=torch.float64)},
    ],
)
def test_a_state_of_no_fit_is_refused(trained, change):
    state = {**trained.state_of(replace(METHOD, epochs=4)), **change}
    with pytest.raises(ValueError, match="must"):
        replace(METHOD, epochs=4).check_state({key: value for key, value in state.items() if value is not None})


def test_methods_that_average_other_things_share_one_training(monkeypatch):
    runs = []
    epochs = RouterPasses._epochs
    monkeypatch.setattr(RouterPasses, "_epochs", lambda *given: (runs.append(given), epochs(*given))[1])
    variants = [METHOD, replace(METHOD, name="mean", num_samples=0), replace(METHOD, name="strong", beta=1.0)]
    found = fit_methods(variants, toy_model(), answer_logits, split(TRAINING, 6, 6), [HELD_OUT])
    assert len(runs) == 2
    alone = fit(METHOD).state_of(METHOD)
    assert all(torch.equal(value, alone[key]) for key, value in found.state_of(METHOD).items())


def test_costs_are_counted():
    of_routes = routing_cost(METHOD, 16, 8)
    assert (of_routes.passes, of_routes.parameters) == (2, 16 * 8 + 16 * 4 + 4 * 8 + 1)
    of_scores = routing_cost(replace(METHOD, average="scores", name="s", label="S"), 16, 8)
    assert (of_scores.passes, of_scores.per_token.sampling) == (1, 2 * of_routes.per_token.sampling)


def test_forms_share_their_noise_before_training():
    one, other = (kind(num_samples=2, epochs=0) for kind in (MeanFieldRouter, FullCovarianceRouter))
    found = [predict(method, toy_model(), HELD_OUT, fit(method).state_of(method)) for method in (one, other)]
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)


def test_routers_that_get_no_noise_are_not_trained(tmp_path):
    model = toy_model()
    model.get_submodule(find_routers(model)[0].name).weight.data.zero_()
    method = replace(METHOD, layers=(0,))
    found = fit(method, model)
    assert any("1 of 1 routers get no noise" in sentence for sentence in found.warnings_of(method))
    state = found.state_of(method)
    assert state["held_out_nll"].shape == (1,)
    plain = answer_logits(model, HELD_OUT)[0].double().log_softmax(-1)
    torch.testing.assert_close(predict(method, model, HELD_OUT, state), plain)
    save_fit(tmp_path, found)
    assert torch.equal(predict(method, model, HELD_OUT, load_fit(tmp_path)[0].state_of(method)), plain)


@pytest.mark.parametrize("method", [METHOD, RouterNoise(), LaplaceRouterNoise()])
def test_routers_with_an_unknown_number_of_experts_are_refused_before_training(method):
    model = toy_model()
    routers = [replace(router, top_k=None) for router in find_routers(model)]
    with pytest.raises(ValueError, match=r"chooses for a token is unknown"):
        method.check_routers(model, routers, lambda: answer_logits(model, HELD_OUT)[0])


@pytest.mark.parametrize("kind", [MeanFieldRouter, RouterNoise])
def test_scores_that_cannot_be_averaged_are_refused_before_training(kind):
    model = toy_model()
    routers = [replace(router, top_k=2, score="other") for router in find_routers(model)]
    for method in (kind(), kind(average="scores", name="s", label="S")):
        with pytest.raises(ValueError, match="score is 'other'") if method.average == "scores" else nullcontext():
            method.check_routers(model, routers, lambda: answer_logits(model, HELD_OUT)[0])


def test_without_epochs_no_labels_of_the_training_data_are_needed():
    assert METHOD.needs.training_labels
    assert not replace(METHOD, epochs=0).needs.training_labels


class Held(torch.nn.Module):
    """A model with Bayesian routers beside it, as a module that trains both holds them."""

    def __init__(self, options=None, layers=(), scale=0.4):
        super().__init__()
        self.model = toy_model()
        if options is not None:
            self.beside = BayesianRouters(self.model, options, layers)
            self.beside.set_scales([scale] * len(self.beside))
            generator = torch.Generator().manual_seed(0)
            for parameter in self.beside.parameters():
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)


def held_logits(held, batch):
    return answer_logits(held.model, batch)


def fit_held(method, held):
    return fit_methods([method], held, held_logits, split(TRAINING, 6, 6), [HELD_OUT])


def test_routers_that_were_trained_with_the_model_take_the_place_of_training(monkeypatch):
    monkeypatch.setattr(RouterPasses, "train", None)
    held, method = Held(RouterOptions()), replace(METHOD, training="with_model")
    method.check_run(held, None)
    state = fit_held(method, held).state_of(method)
    for name, value in router_state(held.beside.nets).items():
        assert torch.equal(state[f"net.{name}"], value)
    view = BatchView(held, held_logits, HELD_OUT, seed=3)
    found = method.log_probs(view, state)
    noise = PositionNoise(3)
    routes = []
    for sample in range(2):
        with torch.no_grad(), sampled_routes(held.model, held.beside.nets, [sample], noise):
            routes.append(held_logits(held, HELD_OUT)[0].log_softmax(-1))
    torch.testing.assert_close(found, torch.stack(routes).logsumexp(0) - math.log(2))
    assert method.hyperparameters(state)["held_out_nll"] == pytest.approx(float(state["held_out_nll"]))
    assert "held_out_nll_untrained" not in method.hyperparameters(state)
    # Post hoc is post hoc, whatever stands beside the model.
    with pytest.raises(TypeError):
        fit_held(METHOD, held)


@pytest.mark.parametrize(
    ("held", "says"),
    [
        (lambda: Held(), r"Held has none; train it with RouterFinetuner or .*training='post_hoc'"),
        (lambda: Held(RouterOptions("full_covariance")), r"beside the model are FullCovarianceLogits of layer 0"),
        (lambda: Held(RouterOptions(), [1]), r"beside the model are MeanFieldLogits of layer 1"),
        (
            lambda: Held(RouterOptions(hidden=5)),
            r"tensor .hidden.* the same hidden, the width",
        ),
    ],
)
def test_other_routers_than_the_method_names_are_refused(held, says):
    module, method = held(), replace(METHOD, training="with_model")
    with pytest.raises(ValueError, match=says):
        method.check_run(module, None)  # before training
    with pytest.raises(ValueError, match=says):
        fit_held(method, module)


@pytest.mark.parametrize("kind", [MeanFieldRouter, FullCovarianceRouter, TemperatureRouter])
def test_the_width_of_hidden_layers_is_that_of_the_routers_beside_the_model(kind):
    method = kind(training="with_model", num_samples=2, hidden=5)
    held = Held(RouterOptions(method.name.removesuffix("_router"), hidden=5))
    method.check_run(held, None)
    if kind is not TemperatureRouter:  # whose experts this model cannot be told
        state = fit_held(method, held).state_of(method)
        assert state["net.0.hidden"].shape[0] == 5
        method.check_state(state)
    default = replace(method, hidden=None)
    with pytest.raises(ValueError, match="the same hidden"):
        default.check_run(held, None)
    numbers = [found.num_parameters(16, 4) for found in (method, default, replace(method, hidden=4))]
    assert numbers[0] > numbers[1] == numbers[2]
    assert method.token_cost(16, 4, 1).linear > default.token_cost(16, 4, 1).linear
    with pytest.raises(ValueError, match="hidden=0"):
        replace(method, hidden=0)


def test_routers_that_were_never_trained_are_refused():
    held = Held()
    held.beside = BayesianRouters(held.model, RouterOptions())
    method = replace(METHOD, training="with_model")
    with pytest.raises(ValueError, match="have not seen a training step"):
        fit_held(method, held)
    with pytest.raises(ValueError, match="Held has none"):
        method.check_run(Held(), None)
    with pytest.raises(ValueError, match="unknown training"):
        replace(METHOD, training="early")
