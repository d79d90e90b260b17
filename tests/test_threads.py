"""One model that several threads use: each gets what serial calls give."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from oracles.cases import built_with_layers, layouts
from oracles.models import answer_logits, toy_batch

from bmoe_lightning import LaplacePosterior
from bmoe_lightning.curvature import Curvature, collect_factors
from bmoe_lightning.experts import down_proj_weights, expert_dropout, find_expert_layers
from bmoe_lightning.methods import get_method, method_names, save_snapshot, swapped_weights
from bmoe_lightning.methods.evaluation import Predictor
from bmoe_lightning.methods.fitting import fit_methods
from bmoe_lightning.methods.options import trial_options
from bmoe_lightning.methods.storage import save_fit
from bmoe_lightning.testing import tiny_model

# Those that need LoRA predict as the others do, with another kind of model.
NAMES = [name for name in method_names() if not get_method(name).needs.lora]

ANSWERS = (3, 5, 7, 11)


def class_logits(model, ids):
    return model(input_ids=ids, use_cache=False).logits[:, -1, list(ANSWERS)], ids.sum(1) % 4


def questions(count, seed, size=4):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(64, (size, 6), generator=generator) for _ in range(count)]


def plain(model, ids):
    with torch.no_grad():
        return class_logits(model, ids)[0]


@pytest.fixture
def impatient():
    """Threads that take turns after a microsecond rather than five milliseconds."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Every registered method fitted to one model: a function that predicts with each."""
    folder, model = tmp_path_factory.mktemp("served"), tiny_model()
    mean = {n: w.clone() for layer in find_expert_layers(model) for n, w in down_proj_weights(model, layer).items()}
    trained = {name: p for name, p in model.named_parameters() if ".experts." in name}
    generator = torch.Generator().manual_seed(7)
    snapshots = []
    for epoch in range(3):
        with torch.no_grad():
            for parameter in trained.values():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
        snapshots.append(folder / f"{epoch}.safetensors")
        save_snapshot(snapshots[-1], trained)
    methods = [get_method(name).with_defaults(Curvature(rank=2)) for name in NAMES]
    methods = [replace(m, **trial_options(type(m))) if m.needs.routers else m for m in methods]
    runs, data = tuple(map(str, snapshots[:2])), (questions(4, 1), questions(30, 2))
    fits = tuple(str(folder / f"fit-{epoch}") for epoch in range(2))
    posteriors = [posterior for method in methods for posterior in method.needs.run_methods]
    for run, path in zip(runs, fits, strict=True):
        with swapped_weights(model, run):
            save_fit(Path(path), fit_methods(posteriors, model, class_logits, *data, prior_mean=mean))
    methods = [
        replace(m, runs=runs, **{"fits": fits} if m.needs.run_methods else {}) if m.needs.runs else m for m in methods
    ]
    fit = fit_methods(methods, model, class_logits, *data, prior_mean=mean, snapshots=snapshots)
    predictors = {method.name: Predictor(method, fit, snapshots) for method in methods}

    def answer(name, ids, class_logits=class_logits):
        return predictors[name].predict(model, class_logits, ids)[0]

    return model, answer


pytestmark = pytest.mark.filterwarnings(
    "ignore:the fitted temperature", "ignore:LPO ended at the limit", "ignore:LPO.s prior precision"
)


@pytest.mark.parametrize("name", NAMES)
def test_another_thread_runs_the_model_in_the_middle_of_a_prediction(served, name):
    """Within the model, and before and after it, the other thread gets the plain model's logits, bit for bit."""
    model, answer = served
    ids, others = questions(2, 5)
    expected, expected_plain = answer(name, ids), plain(model, others)
    thread, seen = threading.get_ident(), []
    with ThreadPoolExecutor(1) as other:

        def interrupt(*_):
            if threading.get_ident() == thread:
                seen.append(other.submit(plain, model, others).result())

        def interrupted(model, ids):
            interrupt()
            found = class_logits(model, ids)
            interrupt()
            return found

        hook = model.model.layers[1].mlp.register_forward_pre_hook(interrupt)
        try:
            found = answer(name, ids, interrupted)
        finally:
            hook.remove()
    assert torch.equal(found, expected)
    assert len(seen) >= 3
    assert all(torch.equal(logits, expected_plain) for logits in seen)
    assert model.get_experts_implementation() == {"": "eager"}
    assert not [key for module in model.modules() for key in vars(module) if "bmoe" in key]


def wrong_answers(model, answer, names, count, num_threads):
    """Answers that differ from serial ones, of so many requests to every method and to the plain model in turn."""
    requests = [(names[i % len(names)], ids) for i, ids in enumerate(questions(count, 9, size=3))]
    serial = [plain(model, ids) if name is None else answer(name, ids) for name, ids in requests]

    def ask(request):
        name, ids = request
        return plain(model, ids) if name is None else answer(name, ids)

    with ThreadPoolExecutor(num_threads) as pool:
        found = list(pool.map(ask, requests))
    return [name for (name, _), one, other in zip(requests, found, serial, strict=True) if not torch.equal(one, other)]


def test_all_methods_at_once(served, impatient):
    model, answer = served
    assert wrong_answers(model, answer, [*NAMES, None, None], 60, 4) == []


@pytest.mark.slow
def test_a_thousand_requests(served, impatient, capsys):
    model, answer = served
    wrong = wrong_answers(model, answer, [*NAMES, None, None, None], 1000, 6)
    with capsys.disabled():
        print(f"\nthreads: {len(wrong)} wrong of 1000")
    assert wrong == []


@layouts
def test_layouts(layout):
    """Posterior and dropout of one thread, forward passes of another with and without gradients."""
    _, model, layers = built_with_layers(layout)
    batch = toy_batch()
    posterior = LaplacePosterior(collect_factors(model, answer_logits, [batch], layers=layers, rank=2))
    expected, plain_logits = posterior.predict(model, answer_logits, batch), answer_logits(model, batch)[0].detach()
    with ThreadPoolExecutor(1) as other:

        def interrupted(model, batch):
            assert torch.equal(other.submit(answer_logits, model, batch).result()[0], plain_logits)
            return answer_logits(model, batch)

        assert torch.equal(posterior.predict(model, interrupted, batch), expected)
        with expert_dropout(model, layers, 0.5, seed=0):
            assert torch.equal(other.submit(answer_logits, model, batch).result()[0], plain_logits)
            assert not torch.equal(answer_logits(model, batch)[0], plain_logits)
    assert not [key for module in model.modules() for key in vars(module) if "bmoe" in key]


@layouts
def test_dropout_in_training_reaches_all_threads(layout):
    """Activations that are recomputed in a backward pass on an accelerator are dropped in a thread of autograd's."""
    _, model, layers = built_with_layers(layout)
    batch = toy_batch()
    model.train()
    before = answer_logits(model, batch)[0]
    with ThreadPoolExecutor(1) as other, expert_dropout(model, layers, 0.5):
        assert not torch.allclose(other.submit(answer_logits, model, batch).result()[0], before)
        other.submit(LaplacePosterior.batch_terms, *prior(model, layers, batch)).result()  # needs the lock
    assert torch.equal(answer_logits(model, batch)[0], before)


def prior(model, layers, batch):
    factors = collect_factors(model, answer_logits, [batch], layers=layers, rank=1)
    return LaplacePosterior(factors), model, answer_logits, batch


class TestSwappedWeights:
    def test_a_second_thread_keeps_the_models_own(self, served):
        model, _ = served
        (ids,) = questions(1, 3)
        name = "model.layers.0.mlp.experts.down_proj"
        expected, own = plain(model, ids), model.get_parameter(name)
        other = {name: 2 * own.detach()}
        with ThreadPoolExecutor(1) as pool, swapped_weights(model, other):
            assert torch.equal(model.get_parameter(name), 2 * own)
            assert torch.equal(model.state_dict()[name], 2 * own)
            assert not torch.equal(plain(model, ids), expected)
            assert torch.equal(pool.submit(plain, model, ids).result(), expected)
            assert pool.submit(model.get_parameter, name).result() is own
            assert torch.equal(pool.submit(model.state_dict).result()[name], own)
            assert own is pool.submit(lambda: dict(model.named_parameters())[name]).result()
        assert model.get_parameter(name) is own
        assert torch.equal(plain(model, ids), expected)

    def test_nested_ones(self, served):
        model, _ = served
        first, second = (f"model.layers.{i}.mlp.experts.down_proj" for i in (0, 1))
        a, b = model.get_parameter(first), model.get_parameter(second)
        with swapped_weights(model, {first: 2 * a, second: 2 * b}):
            with swapped_weights(model, {second: 3 * b}):
                assert torch.equal(model.get_parameter(first), 2 * a)
                assert torch.equal(model.get_parameter(second), 3 * b)
            assert torch.equal(model.get_parameter(second), 2 * b)
        assert model.get_parameter(first) is a
        assert type(model.model.layers[0].mlp.experts._parameters) is dict

    def test_tied_and_recurrent_weights(self):
        model = torch.nn.ModuleDict({"one": torch.nn.Linear(3, 3, bias=False), "lstm": torch.nn.LSTM(3, 2)})
        model["two"] = torch.nn.Linear(3, 3, bias=False)
        model["two"].weight = model["one"].weight
        x = torch.randn(4, 3)
        expected = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in expected.parameters():
                parameter.mul_(2)
        with swapped_weights(model, {name: 2 * p.detach() for name, p in model.named_parameters()}):
            assert torch.equal(model["two"](x), expected["two"](x))
            assert torch.equal(model["lstm"](x)[0], expected["lstm"](x)[0])

    def test_weights_on_the_meta_device_are_refused(self):
        model = torch.nn.Linear(2, 2, bias=False, device="meta")
        with (
            pytest.raises(ValueError, match="holds on the meta device, without values"),
            swapped_weights(model, {"weight": torch.ones(2, 2)}),
        ):
            pass

    def test_parametrisations_within(self, served):
        """PEFT parametrises adapted parameters for each forward pass."""
        model = torch.nn.Linear(2, 2, bias=False)
        own, value = model.weight, model.weight.detach().clone()
        with swapped_weights(model, {"weight": torch.ones(2, 2)}):
            torch.nn.utils.parametrize.register_parametrization(model, "weight", torch.nn.ReLU())
            assert torch.equal(model.weight, torch.ones(2, 2))
            torch.nn.utils.parametrize.remove_parametrizations(model, "weight", leave_parametrized=False)
            assert torch.equal(model.weight, torch.ones(2, 2))
        assert model.weight is own
        assert torch.equal(model.weight, value)


def test_copies_made_meanwhile_have_the_models_own_weights_and_nothing_attached(served):
    model, _ = served
    own = model.model.layers[0].mlp.experts
    with (
        ThreadPoolExecutor(1) as other,
        swapped_weights(model, {"model.layers.0.mlp.experts.down_proj": 2 * own.down_proj.detach()}),
        expert_dropout(model, find_expert_layers(model), 0.5, seed=0),
    ):
        ways = copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))
        copies = [other.submit(way, own).result() for way in ways]
    for copied in copies:
        assert type(copied._parameters) is dict
        assert torch.equal(copied.down_proj, own.down_proj)
        assert copied.__dict__.get("_bmoe_state") is None


def test_failures_leave_nothing(served):
    model, answer = served
    ids, others = questions(2, 4)
    expected = plain(model, others)

    def failing(model, ids):
        class_logits(model, ids)
        raise KeyboardInterrupt

    for name in NAMES:
        with pytest.raises(KeyboardInterrupt):
            answer(name, ids, failing)
        with ThreadPoolExecutor(1) as other:  # which would wait for a lock that was not released
            assert torch.isfinite(other.submit(answer, "map", ids).result(timeout=60)).all()
    assert torch.equal(plain(model, others), expected)
    assert torch._dynamo.eval_frame._stance.stance == "default"
