"""Routes and expert posterior together: both limits, the sum of covariances, and a joint fit that loses to neither."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from forked_processes import run
from methods_cases import RANK3
from oracles.models import answer_logits, split, toy_batch, toy_model
from torch.utils.data import DataLoader

from bmoe_lightning.curvature import collect_factors
from bmoe_lightning.laplace import LaplacePosterior
from bmoe_lightning.laplace.covariance import prior_covariance
from bmoe_lightning.laplace.predictive import class_probabilities
from bmoe_lightning.laplace.prior import validation_nll
from bmoe_lightning.laplace.widened_cache import WidenedCache
from bmoe_lightning.methods import (
    BatchView,
    LaplaceLPO,
    LaplaceRouterNoise,
    RouterNoise,
    batch_view,
    evaluate,
    fit_methods,
)
from bmoe_lightning.methods.evaluation import Predictor
from bmoe_lightning.methods.routes import route_moments
from bmoe_lightning.methods.routing_cost import routing_cost
from bmoe_lightning.methods.storage import load_fit, save_fit
from bmoe_lightning.routers import FixedNoise, PositionNoise, find_routers, intercepted_routers, sampled_routes

SCALES = (1.0, 3.0)
ALONE = LaplaceLPO(curvature=RANK3)


def joint(**options):
    return LaplaceRouterNoise(curvature=RANK3, **{"num_samples": 4, "scales": SCALES, **options})


def drawn(probabilities, seed=0):
    return torch.multinomial(probabilities, 1, generator=torch.Generator().manual_seed(seed)).squeeze(1)


def labelled(model, batches, temperature):
    """The batches with labels drawn from the model's probabilities at a temperature."""
    return [{**b, "labels": drawn((plain_logits(model, [b]) / temperature).softmax(-1))} for b in batches]


def plain_logits(model, batches):
    with torch.no_grad():
        return torch.cat([answer_logits(model, batch)[0].double() for batch in batches])


def along_routes(model, batches, sigma, num_samples=4, seed=0):
    """Log-probabilities `[S, N, K]`, one pass for each route and batch."""
    noise, routes = PositionNoise(seed), []
    for sample in range(num_samples):
        nets = [FixedNoise(router, scale) for router, scale in zip(find_routers(model), sigma.tolist(), strict=True)]
        with sampled_routes(model, nets, [sample], noise):
            routes.append(plain_logits(model, batches).log_softmax(-1))
    return torch.stack(routes)


def gaussian_over(logits, routes):
    """Mean `[N, K]` and covariance `[N, K, K]` over routes of the logits, centred over an example's classes; a loop."""
    mean = torch.full_like(logits, -torch.inf)
    total = torch.zeros(*logits.shape, logits.shape[1], dtype=torch.float64)
    for row in range(len(logits)):
        classes = (logits[row] != -torch.inf).nonzero().flatten()
        values = routes[:, row, classes]
        values = values - values.mean(1, keepdim=True)
        mean[row, classes] = values.mean(0)
        total[row, classes.unsqueeze(1), classes] = torch.cov(values.T, correction=0)
    return mean, total


@pytest.fixture(scope="module")
def confident():
    """A model that is too sure, training data, and held-out data with ragged choices in two batches.

    The labels are those of other routes, and flatter, so that both sources of uncertainty are wanted.
    """
    model = toy_model()
    with torch.no_grad():
        model.head.weight.mul_(3)
    batch = toy_batch(num_rows=60, seed=4)
    batch["absent"] = torch.zeros(60, 4, dtype=torch.bool)
    batch["absent"][::3, 3] = True
    routes = along_routes(model, [batch], torch.tensor([1.0, 1.0]), num_samples=8, seed=5)
    batch["labels"] = drawn((routes / 2).softmax(-1).mean(0))
    return model, split(toy_batch(num_rows=40, seed=3), 20, 20), split(batch, 30, 30)


@pytest.fixture(scope="module")
def fit(confident):
    model, training, held_out = confident
    return fit_methods([ALONE, joint()], model, answer_logits, training, held_out)


def posterior_of(fit, precision):
    return fit.posteriors[RANK3.digest].with_prior_precision(precision)


def test_the_moments_over_routes(confident):
    model, _, held_out = confident
    logits = plain_logits(model, held_out)
    routes = along_routes(model, held_out, torch.tensor([1.0, 2.0]))
    mean, deviations = route_moments(logits, routes)
    expected = gaussian_over(logits, routes)
    torch.testing.assert_close((mean, deviations @ deviations.mT), expected, rtol=1e-9, atol=1e-12)
    shifted = route_moments(logits, routes + torch.randn(4, len(logits), 1).double())
    torch.testing.assert_close(shifted, (mean, deviations), rtol=1e-9, atol=1e-9)
    assert torch.equal(mean == -torch.inf, logits == -torch.inf)


class TestLimits:
    def test_without_noise_it_is_the_posterior_alone_bit_for_bit(self, confident, fit):
        model, _, held_out = confident
        state, of_posterior = fit.state_of(joint()), fit.state_of(ALONE)
        assert torch.equal(state["prior_precision"], of_posterior["prior_precision"])  # the candidate without noise
        still = {"joint_precision": state["prior_precision"], "sigma": torch.zeros(2).double()}
        view = BatchView(model, answer_logits, held_out[0], fit.posteriors, seed=fit.seed)
        expected = ALONE.log_probs(view, of_posterior)
        assert torch.equal(joint().log_probs(view, {**state, **still}), expected)
        assert not torch.allclose(joint().log_probs(view, state), expected)

    @pytest.mark.parametrize("link", ["mc", "isotropic", "probit", "laplace_bridge"])
    def test_without_posterior_it_is_the_gaussian_over_routes(self, confident, fit, link):
        model, _, held_out = confident
        method = joint(link=link)
        state = {**fit.state_of(joint()), "posterior_share": torch.zeros(()).double()}
        assert (state["sigma"] > 0).all()
        logits, routes = plain_logits(model, held_out), along_routes(model, held_out, state["sigma"])
        expected = class_probabilities(*gaussian_over(logits, routes), link, seed=fit.seed)
        views = [BatchView(model, answer_logits, batch, fit.posteriors, seed=fit.seed) for batch in held_out]
        found = torch.cat([method.log_probs(view, state) for view in views])
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
        method.check_state(state)

    def test_without_either_it_is_the_model(self, confident, fit):
        model, _, held_out = confident
        zeros = {"posterior_share": torch.zeros(()).double(), "sigma": torch.zeros(2).double()}
        view = BatchView(model, answer_logits, held_out[0], fit.posteriors)
        found = joint().log_probs(view, {**fit.state_of(joint()), **zeros})
        torch.testing.assert_close(found, view.logits.log_softmax(-1), rtol=1e-9, atol=1e-12)

    def test_labels_that_want_neither_get_the_model_itself(self, confident):
        model, training, held_out = confident
        method = joint(scales=(1e3,), scope="global", link="probit")  # which has no Monte Carlo error
        held_out = [{**b, "labels": plain_logits(model, [b]).argmax(1)} for b in held_out]
        fit = fit_methods([method], model, answer_logits, training, held_out)
        assert float(fit.state_of(method)["posterior_share"]) == float(fit.state_of(method)["scale"]) == 0
        said = [sentence for sentence in fit.warnings_of(method) if "routers" in sentence]
        assert len(said) == 1
        assert "both fitted as 0" in said[0]
        assert "those of the model itself" in said[0]


@pytest.mark.parametrize("link", ["mc", "isotropic", "probit"])
def test_the_covariances_are_added(confident, fit, link):
    model, _, held_out = confident
    method, state = joint(link=link), fit.state_of(joint())
    assert float(state["scale"]) > 0
    assert not int(state["mixture"])
    posterior = posterior_of(fit, state["joint_precision"])
    for batch in held_out:
        logits, covariance = posterior.logit_covariance(model, answer_logits, batch, centred=True)
        mean, of_routes = gaussian_over(logits, along_routes(model, [batch], state["sigma"]))
        total = covariance + of_routes
        view = BatchView(model, answer_logits, batch, fit.posteriors, seed=fit.seed)
        log_probs, found = method.log_probs(view, state), method.logit_covariance(view, state)
        torch.testing.assert_close(found, (mean, total), rtol=1e-7, atol=1e-9)
        expected = class_probabilities(mean, total, link, seed=fit.seed)
        torch.testing.assert_close(log_probs, expected, rtol=1e-6, atol=1e-7)


def losses(confident, fit, method, alone):
    """The validation loss of the joint fit, of the posterior alone, and of the best routes alone."""
    model, _, held_out = confident
    state, unit = fit.state_of(method), fit.state_of(method)["unit"]
    cache = fit.posteriors[RANK3.digest].validation_cache(model, answer_logits, held_out)

    def loss(scale, precision):
        if scale == 0:
            return validation_nll(cache, precision, seed=fit.seed)
        moments = route_moments(cache.logits, along_routes(model, held_out, scale * unit))
        return validation_nll(WidenedCache.of(cache, *moments), precision, seed=fit.seed)

    nowhere = torch.full((2,), math.inf, dtype=torch.float64)
    precision = state["joint_precision"] if float(state["posterior_share"]) else nowhere
    of_routes = min(loss(scale, nowhere) for scale in (0.0, *method.scales))
    return loss(float(state["scale"]), precision), loss(0, fit.state_of(alone)["prior_precision"]), of_routes


class TestTheValidationLoss:
    def test_is_less_than_that_of_either_alone(self, confident, fit):
        together, of_posterior, of_routes = losses(confident, fit, joint(), ALONE)
        assert together < min(of_posterior, of_routes) - 1e-3

    @pytest.mark.parametrize(("scope", "temperature"), [("global", 1.0), ("layer", 30.0)])
    def test_is_never_more_than_that_of_either_alone(self, confident, scope, temperature):
        model, training, held_out = confident
        held_out = labelled(model, held_out, temperature)
        alone, method = LaplaceLPO(curvature=RANK3, scope=scope), joint(scope=scope, scales=(1.0,))
        fit = fit_methods([alone, method], model, answer_logits, training, held_out)
        together, of_posterior, of_routes = losses((model, training, held_out), fit, method, alone)
        assert together <= of_posterior + 1e-9
        assert together <= of_routes + 1e-9


def nll(predictions):
    return -float(predictions.log_probs.gather(1, predictions.labels.unsqueeze(1)).mean())


NOISE = RouterNoise(num_samples=4, scales=SCALES)


def of_all_links(links):
    """For each link, the posterior alone and both together."""
    pairs = {link: (replace(ALONE, scope="global", link=link), joint(scope="global", link=link)) for link in links}
    return {link: [replace(m, name=f"{m.name}_{link}", label=link) for m in pair] for link, pair in pairs.items()}


@pytest.fixture(scope="module")
def multimodal(confident, fit):
    """A model that is sure along each route, and labels of one route for each example, drawn from those of a fit."""
    model, training, held_out = confident
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.head.weight.mul_(6)
    routes = along_routes(model, held_out, 3 * fit.state_of(joint())["unit"]).softmax(-1)
    labels = drawn(routes.mean(0)).split(30)
    return model, training, [{**b, "labels": found} for b, found in zip(held_out, labels, strict=True)]


@pytest.mark.parametrize("case", ["of_one_route", "flat", "of_other_routes"])
def test_held_out_predictions_are_never_worse_than_the_better_of_the_two_methods_alone(request, confident, case):
    model, training, held_out = request.getfixturevalue("multimodal") if case == "of_one_route" else confident
    if case == "flat":
        held_out = labelled(model, held_out, 3.0)
    methods = of_all_links(["mc", "isotropic"])
    every = [NOISE, *(method for pair in methods.values() for method in pair)]
    fit = fit_methods(every, model, answer_logits, training, held_out)
    found = {name: nll(found) for name, found in evaluate(every, fit, model, answer_logits, held_out).items()}
    for alone, together in methods.values():
        assert found[together.name] <= min(found[alone.name], found[NOISE.name]) + 1e-9
        assert int(fit.state_of(together)["mixture"]) == (case == "of_one_route")


def test_a_mixture_of_routes_is_router_noise_without_a_backward_pass(multimodal, monkeypatch, tmp_path):
    model, training, held_out = multimodal
    method = joint(scope="global")
    fit = fit_methods([NOISE, method], model, answer_logits, training, held_out)
    save_fit(tmp_path, fit)
    fit = load_fit(tmp_path)[0]
    state = fit.state_of(method)
    assert int(state["mixture"]) == method.hyperparameters(state)["mixture"] == 1
    assert float(state["scale"]) == float(fit.state_of(NOISE)["scale"]) > 0
    assert not any("routes alone" in sentence for sentence in fit.warnings_of(method))

    def refused(*_args, **_options):
        raise AssertionError("a linearised pass")

    monkeypatch.setattr(batch_view, "posterior_terms", refused)
    found = evaluate([NOISE, method], fit, model, answer_logits, held_out)
    assert torch.equal(found[method.name].log_probs, found[NOISE.name].log_probs)
    information = found[method.name].uncertainty["mutual_information"]
    assert torch.equal(information, found[NOISE.name].uncertainty["mutual_information"])
    predictor = Predictor(method, fit)
    log_probs, view = predictor.predict(model, answer_logits, held_out[0])
    torch.testing.assert_close(log_probs, found[method.name].log_probs[:30])
    assert predictor.covariance(view) is None


def test_its_counted_cost():
    cost = routing_cost(joint(), 16, 8)
    assert cost == replace(routing_cost(NOISE, 16, 8), passes=5)


def test_an_expert_that_only_a_sampled_route_reaches_has_the_prior():
    """The linearised pass along the route, as the mixture of one posterior for each route takes it."""
    model = toy_model(num_experts=2, top_k=1, num_layers=1)
    routers = find_routers(model)

    def to(expert):
        preferred = torch.nn.functional.one_hot(torch.tensor(expert), 2)
        return intercepted_routers(
            model, routers, lambda _router, _u, logits: preferred.to(logits).expand_as(logits).contiguous()
        )

    with to(0):
        data = [toy_batch(num_rows=20, seed=3)]
        factors = collect_factors(model, answer_logits, data, rank=3)
    assert factors.layers[0].slots.tolist()[1] == 0
    posterior = LaplacePosterior(factors, 0.5)
    found = {}
    for expert in (0, 1):
        with to(expert):
            terms = posterior.batch_terms(model, answer_logits, toy_batch(num_rows=4))
        found[expert] = posterior.covariance_of(terms), prior_covariance(terms, posterior.prior_precision)
    idle, of_prior = found[1]
    torch.testing.assert_close(idle, of_prior, rtol=1e-12, atol=1e-12)
    assert idle.diagonal(dim1=1, dim2=2).min() > 0
    seen, before = found[0]
    assert (seen.diagonal(dim1=1, dim2=2) < 0.99 * before.diagonal(dim1=1, dim2=2)).any()


def test_ranks_find_what_one_process_does(confident, tmp_path):
    model, training, held_out = confident
    method = joint(num_samples=2, scales=(1.0,), scope="global")
    whole = {name: torch.cat([batch[name] for batch in held_out]) for name in held_out[0]}
    train = {name: torch.cat([batch[name] for batch in training]) for name in training[0]}
    alone = fit_methods([method], model, answer_logits, [train], [whole]).state_of(method)

    def rank(number, world_size):
        shards = [{name: values[number::world_size] for name, values in data.items()} for data in (train, whole)]
        data = split(shards[0], 20), split(shards[1], 15, 15)
        found = fit_methods([method], model, answer_logits, *data, distributed=True).state_of(method)
        torch.testing.assert_close(dict(found), dict(alone), rtol=1e-4, atol=1e-9)

    run(rank, 2, tmp_path)


def test_methods_with_the_same_routes_share_their_passes(confident):
    model, training, held_out = confident
    calls = []

    def counted(model, batch):
        calls.append(batch)
        return answer_logits(model, batch)

    noise = RouterNoise(num_samples=4, scales=(1.0,))
    alone, together = (replace(method, scope="global") for method in (ALONE, joint(scales=(1.0,))))
    counts = []
    for methods in ([alone, noise], [alone, together, noise]):
        calls.clear()
        fit = fit_methods(methods, model, counted, training, held_out)
        counts.append(len(calls))
    assert counts[0] == counts[1]
    calls.clear()
    assert float(fit.state_of(together)["scale"]) == float(fit.state_of(noise)["scale"]) == 1
    evaluate(methods, fit, model, counted, held_out)
    assert len(calls) == len(held_out) * (1 + 4)


@pytest.mark.parametrize("own", [False, True], ids=["global", "own"])
def test_a_loader_that_shuffles_gives_all_passes_one_order(confident, own):
    model, training, held_out = confident
    batch = held_out[0]
    rows = [{name: values[index] for name, values in batch.items()} for index in range(len(batch["labels"]))]
    generator = torch.Generator().manual_seed(3) if own else None
    loader = DataLoader(rows, batch_size=10, shuffle=True, generator=generator)
    state = torch.get_rng_state(), generator and generator.get_state()
    method = joint(scales=(1.0,))
    found = fit_methods([method], model, answer_logits, training, loader).state_of(method)
    assert float(found["scale"]) in (0, 1)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert generator is None or torch.equal(generator.get_state(), state[1])


def test_data_in_another_order_in_each_pass_are_refused(confident):
    model, training, held_out = confident
    generator = torch.Generator().manual_seed(0)

    class Shuffled:
        def __iter__(self):
            for batch in held_out:
                order = torch.randperm(30, generator=generator)
                yield {name: values[order] for name, values in batch.items()}

    with pytest.raises(ValueError, match="another order of the examples; use a loader that does not shuffle"):
        fit_methods([joint(scales=(1.0,))], model, answer_logits, training, Shuffled())


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"num_samples": 0}, "num_samples must be at least 1"),
        ({"link_samples": 0}, "num_samples must be at least 1"),
        ({"samples_per_pass": 0}, "at least one sample"),
        ({"scales": ()}, "positive numbers"),
        ({"scope": "expert"}, "scope"),
        ({"link": "no"}, "link"),
    ],
)
def test_refused_options(options, found):
    with pytest.raises(ValueError, match=found):
        joint(**options)


STATE = {
    "prior_precision": torch.ones(2).double(),
    "joint_precision": torch.ones(2).double(),
    "posterior_share": torch.ones(()).double(),
    "mixture": torch.zeros((), dtype=torch.int64),
    "scale": torch.ones(()).double(),
    "unit": torch.ones(2).double(),
    "sigma": torch.ones(2).double(),
}


@pytest.mark.parametrize(
    "change",
    [
        {"prior_precision": None},
        {"joint_precision": None},
        {"joint_precision": torch.ones(3).double()},
        {"joint_precision": -torch.ones(2).double()},
        {"posterior_share": torch.tensor(0.5).double()},
        {"mixture": None},
        {"mixture": torch.zeros(()).double()},
        {"mixture": torch.tensor(2)},
        {"mixture": torch.tensor(1)},
        {"sigma": None},
        {"unit": torch.ones(3).double()},
    ],
)
def test_a_state_of_no_fit_is_refused(change):
    joint().check_state(STATE)
    state = {key: value for key, value in {**STATE, **change}.items() if value is not None}
    with pytest.raises(ValueError, match=r"must|lacks"):
        joint().check_state(state)


def test_numbers_to_log():
    numbers = joint().hyperparameters({**STATE, "joint_precision": torch.tensor([2.0, 3.0]).double()})
    assert numbers == {
        "num_samples": 4,
        "mixture": 0,
        "scale": 1,
        "sigma": 1,
        "prior_precision_0": 2,
        "prior_precision_1": 3,
    }
    assert "prior_precision" not in joint().hyperparameters({**STATE, "posterior_share": torch.zeros(()).double()})
