import random
from collections import OrderedDict, defaultdict, namedtuple

import pytest
import torch
from oracles.cases import built_with_layers as built
from oracles.cases import layouts
from oracles.dense import canonical, observe
from oracles.models import (
    ToyMixture,
    answer_logits,
    choice_batch,
    choices_one_call_each,
    tiny_qwen,
    toy_batch,
    toy_model,
)
from transformers import BatchEncoding

from bmoe_lightning.curvature import collect_factors
from bmoe_lightning.experts import ExpertLayer, find_expert_layers, tapped_batch
from bmoe_lightning.experts.taps import Taps
from bmoe_lightning.laplace import LaplacePosterior


def class_gradients(tapped, position):
    """`[K, S, d_out]`."""
    weights = torch.eye(tapped.logits.shape[1], dtype=torch.float64)
    return torch.stack([tapped.taps.gradients(tapped.logits, w.expand(tapped.logits.shape))[position] for w in weights])


@layouts
@pytest.mark.parametrize("pad", ["left", "right"])
def test_slots_are_what_the_models_own_loop_sees(layout, pad):
    fused, model, layers = built(layout, idle=[2])
    batch = toy_batch(pad=pad)
    logits, observed = observe(fused, answer_logits, batch)
    with tapped_batch(model, layers, answer_logits, batch) as tapped:
        torch.testing.assert_close(tapped.logits, logits, rtol=1e-13, atol=1e-13)
        for position, seen in enumerate(observed):
            slots, gradients = tapped.taps.slots(position), class_gradients(tapped, position)
            assert torch.equal(slots.experts.sort().values, seen.experts.sort().values)
            assert 2 not in slots.experts
            # Padding is alike in every row, so only the slots that count have an order of their own.
            moves = (gradients != 0).any(2).any(0)
            rows = [] if layout == "modules" else [slots.rows[moves]]
            assert (slots.rows is None) == (layout == "modules")
            found = canonical(slots.experts[moves], slots.inputs[moves], gradients[:, moves], *rows)
            wanted = canonical(*seen.counted(), seen.tokens[seen.moves] // 7)
            for f, w in zip(found, wanted, strict=False):
                torch.testing.assert_close(f, w, rtol=1e-11, atol=1e-13)


@layouts
def test_padding_and_positions_behind_the_answer_have_zero_gradient(layout):
    fused, model, layers = built(layout)
    batch = toy_batch(pad="right")
    _, observed = observe(fused, answer_logits, batch)
    lengths = batch["mask"].sum(1)
    assert int(lengths.min()) < 7
    with tapped_batch(model, layers, answer_logits, batch) as tapped:
        for position, seen in enumerate(observed):
            moves = (class_gradients(tapped, position) != 0).any(2).any(0)
            place, length = seen.tokens % 7, lengths[seen.tokens // 7]
            # The first layer is heard of at every real position, the last one only at the answer's.
            expected = place < length if position == 0 else place == length - 1
            assert int(moves.sum()) == int(expected.sum())
            slots = tapped.taps.slots(position)
            found = canonical(slots.experts[moves], slots.inputs[moves])
            wanted = canonical(seen.experts[expected], seen.inputs[expected])
            for f, w in zip(found, wanted, strict=True):
                torch.testing.assert_close(f, w, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_transformers_model(implementation):
    dtype = torch.float64 if implementation == "eager" else torch.float32
    model = tiny_qwen(dtype=dtype, implementation=implementation)
    layers, batch = find_expert_layers(model), toy_batch()
    logits, observed = observe(model, answer_logits, batch)
    with tapped_batch(model, layers, answer_logits, batch) as tapped:
        torch.testing.assert_close(tapped.logits, logits, rtol=1e-4, atol=1e-5)
        for position, seen in enumerate(observed):
            slots, gradients = tapped.taps.slots(position), class_gradients(tapped, position)
            assert torch.equal(slots.experts.sort().values, seen.experts.sort().values)
            # Padding is alike in every row, so only the slots that count have an order of their own.
            moves = (gradients != 0).any(2).any(0)
            found = canonical(slots.experts[moves], slots.inputs[moves], gradients[:, moves], slots.rows[moves])
            wanted = canonical(*seen.counted(), seen.tokens[seen.moves] // 7)
            for f, w in zip(found, wanted, strict=True):
                torch.testing.assert_close(f, w, rtol=1e-3, atol=1e-4)


def test_gradient_is_taken_before_the_routing_weight():
    """A slot's gradient times its weight matrix's input gives the weight's own gradient."""
    fused, model, layers = built("fused")
    batch = toy_batch()
    direction = torch.randn(5, 4, dtype=torch.float64)
    logits = answer_logits(fused, batch)[0]
    expected = torch.autograd.grad((logits * direction).sum(), fused.layers[0].mixture.crew.down_proj)[0]
    with tapped_batch(model, layers, answer_logits, batch) as tapped:
        slots, gradients = tapped.taps.slots(0), tapped.taps.gradients(tapped.logits, direction)[0]
    total = torch.zeros(4, 6, 5, dtype=torch.float64)
    total.index_add_(0, slots.experts, gradients.unsqueeze(2) * slots.inputs.unsqueeze(1))
    torch.testing.assert_close(total, expected, rtol=1e-11, atol=1e-13)


def test_gradients_of_chosen_layers():
    _, model, layers = built("fused", num_layers=3)
    with tapped_batch(model, layers, answer_logits, toy_batch()) as tapped:
        weights = torch.ones_like(tapped.logits)
        every = tapped.taps.gradients(tapped.logits, weights)
        last, first = tapped.taps.gradients(tapped.logits, weights, [2, 0])
    assert torch.equal(last, every[2])
    assert torch.equal(first, every[0])


def test_rows_count_over_calls():
    _, model, layers = built("fused")
    batch = choice_batch(num_examples=4, num_choices=3)
    with tapped_batch(model, layers, choices_one_call_each, batch) as tapped:
        assert tapped.taps.num_rows == 12
        rows = tapped.taps.slots(0).rows
    assert torch.equal(rows.unique(), torch.arange(12))
    assert rows.bincount().tolist() == [6 * 2] * 12


def state_of(model):
    return (
        [module.training for module in model.modules()],
        [(p.requires_grad, None if p.grad is None else p.grad.clone(), p._version) for p in model.parameters()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        ["_bmoe_state" in m.__dict__ for m in model.modules()],
        model.get_experts_implementation(),
        torch.get_rng_state(),
        torch.is_grad_enabled(),
    )


def same(before, after):
    for x, y in zip(before[1], after[1], strict=True):
        assert x[0] == y[0]
        assert x[2] == y[2]
        assert (x[1] is None) == (y[1] is None)
        assert x[1] is None or torch.equal(x[1], y[1])
    assert torch.equal(before[5], after[5])
    assert [before[i] for i in (0, 2, 3, 4, 6)] == [after[i] for i in (0, 2, 3, 4, 6)]


@layouts
@pytest.mark.parametrize("fails", [None, "inside", "class_logits"])
def test_nothing_is_touched(layout, fails):
    _, model, layers = built(layout)
    model.train()
    model.layers[0].eval()  # modes differ within the model
    model.head.weight.requires_grad_(False)
    model.layers[1].query.weight.grad = torch.ones_like(model.layers[1].query.weight)
    before = state_of(model)

    def class_logits(m, batch):
        assert not any(module.training for module in m.modules())
        assert not any(p.requires_grad for p in m.parameters())
        result = answer_logits(m, batch)
        if fails == "class_logits":
            raise ZeroDivisionError
        return result

    def run():
        with tapped_batch(model, layers, class_logits, toy_batch()) as tapped:
            tapped.taps.gradients(tapped.logits, torch.ones_like(tapped.logits))
            if fails == "inside":
                raise ZeroDivisionError

    if fails:
        with pytest.raises(ZeroDivisionError):
            run()
    else:
        run()
    same(before, state_of(model))


def test_a_layer_that_does_not_exist_leaves_nothing_behind():
    _, model, layers = built("fused")
    before = state_of(model)
    wrong = ExpertLayer("layers.9.mixture.crew", 2, 4, 5, 6, "fused", "down_proj")
    with pytest.raises(AttributeError):
        tapped_batch(model, [*layers, wrong], answer_logits, toy_batch()).__enter__()
    same(before, state_of(model))


@layouts
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_around(layout, mode):
    _, model, layers = built(layout)
    with tapped_batch(model, layers, answer_logits, toy_batch()) as tapped:
        expected = tapped.taps.gradients(tapped.logits, torch.ones_like(tapped.logits))
    with mode():
        batch = toy_batch()
        assert batch["ids"].is_inference() == (mode is torch.inference_mode)
        with tapped_batch(model, layers, answer_logits, batch) as tapped:
            found = tapped.taps.gradients(tapped.logits, torch.ones_like(tapped.logits))
        assert torch.is_inference_mode_enabled() == (mode is torch.inference_mode)
        assert not torch.is_grad_enabled()
    for f, e in zip(found, expected, strict=True):
        assert torch.equal(f, e)


Pair = namedtuple("Pair", ["first", "second"])


@pytest.mark.parametrize(
    ("pack", "unpack"),
    [
        (lambda d, s: {**d, "scale": s}, lambda b: (b, b["scale"])),
        (lambda d, s: BatchEncoding({**d, "scale": s}), lambda b: (b, b["scale"])),
        (lambda d, s: OrderedDict(**d, scale=s), lambda b: (b, b["scale"])),
        (lambda d, s: defaultdict(list, {**d, "scale": s}), lambda b: (b, b["scale"])),
        (lambda d, s: [d, (s, "text")], lambda b: (b[0], b[1][0])),
        (lambda d, s: Pair(d, {"x": [s]}), lambda b: (b.first, b.second["x"][0])),
    ],
)
def test_containers_of_inference_tensors(pack, unpack):
    """Lightning's evaluation loops hand over inference tensors; a product with one must still be differentiable."""
    _, model, layers = built("fused")

    def class_logits(m, packed):
        batch, scale = unpack(packed)
        logits, labels = answer_logits(m, batch)
        return logits * scale, labels

    with torch.inference_mode():
        batch = pack(toy_batch(), torch.full((5, 1), 2.0, dtype=torch.float64))
        with tapped_batch(model, layers, class_logits, batch) as tapped:
            gradients = tapped.taps.gradients(tapped.logits, torch.ones_like(tapped.logits))
    assert float(gradients[0].abs().max()) > 0
    assert unpack(batch)[1].is_inference()  # the caller's batch is as it was


def test_other_batches_are_handed_over_as_they_are():
    _, model, layers = built("fused")
    seen = []

    class Custom:
        values = toy_batch()

    batch = Custom()

    def class_logits(m, given):
        seen.append(given)
        return answer_logits(m, given.values)

    with tapped_batch(model, layers, class_logits, batch):
        pass
    assert seen == [batch]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: f.softmax(-1), "returned probabilities"),
        (lambda f: torch.where(f == f.max(), torch.nan, f), "NaN"),
        (lambda f: torch.where(f == f.max(), torch.inf, f), "NaN or"),
        (lambda f: f.masked_fill(torch.tensor([True, True, True, False]), -torch.inf), "fewer than two classes"),
        (lambda f: f[:, 0], r"shape \[B, K\] with K >= 2, got torch.float64 \(5,\)"),
        (lambda f: f[:, :1], r"\(5, 1\)"),
        (lambda f: f.unsqueeze(0), r"\(1, 5, 4\)"),
        (lambda f: f.argmax(-1, keepdim=True).expand(-1, 4), "torch.int64"),
    ],
)
def test_bad_logits_are_refused(spoil, message):
    _, model, layers = built("fused")
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        tapped_batch(model, layers, lambda m, b: (spoil(answer_logits(m, b)[0]), None), toy_batch()).__enter__()
    same(before, state_of(model))


def test_a_layer_that_is_not_run():
    _, model, layers = built("fused")
    other = toy_model(seed=9)
    with (
        tapped_batch(model, layers, lambda _, b: answer_logits(other, b), toy_batch()) as tapped,
        pytest.raises(RuntimeError, match=r"no token was routed through the expert layer 'layers.0.mixture.crew'"),
    ):
        tapped.taps.slots(0)


@layouts
def test_logits_without_a_graph_are_refused(layout):
    _, model, layers = built(layout)

    def detached(m, batch):
        logits, labels = answer_logits(m, batch)
        return logits.detach(), labels

    with (
        tapped_batch(model, layers, detached, toy_batch()) as tapped,
        pytest.raises(RuntimeError, match=r"class_logits returned logits without a graph.*no_grad"),
    ):
        tapped.taps.gradients(tapped.logits, torch.ones_like(tapped.logits))


@layouts
def test_a_layer_that_runs_without_gradients_is_refused(layout):
    _, model, layers = built(layout)

    def class_logits(m, batch):
        with torch.no_grad():
            return answer_logits(m, batch)

    with (
        pytest.raises(RuntimeError, match=r"expert layer 'layers.0.mixture.crew' ran without gradients.*no_grad"),
        tapped_batch(model, layers, class_logits, toy_batch()),
    ):
        pass


def test_absent_classes():
    _, model, layers = built("fused")
    batch = toy_batch()
    batch["absent"] = torch.zeros(5, 4, dtype=torch.bool)
    batch["absent"][1, 3] = batch["absent"][2, 0] = True
    with tapped_batch(model, layers, answer_logits, batch) as tapped:
        assert torch.equal(tapped.present, ~batch["absent"])
        assert bool(tapped.logits.isfinite().all())
        log_probs = tapped.log_probs
        gradients = tapped.taps.gradients(tapped.logits, torch.ones_like(tapped.logits))
    assert all(bool(g.isfinite().all()) for g in gradients)
    assert torch.equal(log_probs == -torch.inf, batch["absent"])
    torch.testing.assert_close(log_probs, answer_logits(model, batch)[0].detach().log_softmax(-1))
    assert log_probs.dtype == torch.float64
    assert not log_probs.requires_grad


def test_python_randomness_is_not_touched():
    _, model, layers = built("fused")
    random.seed(0)
    state = random.getstate()
    with tapped_batch(model, layers, answer_logits, toy_batch()):
        pass
    assert random.getstate() == state


def test_rows_of_tokens():
    """Only a layer that saw as many tokens as the model was given can be taken to have seen them in order."""
    taps = Taps(())
    taps.begin_call(2, [8, 6])
    assert taps.rows_of(torch.arange(8), 8).tolist() == [0] * 4 + [1] * 4
    assert taps.rows_of(torch.tensor([5, 0]), 6).tolist() == [1, 0]  # a decoder beside the encoder
    assert taps.rows_of(torch.arange(4), 4) is None
    assert taps.rows_of(None, 8) is None
    taps.begin_call(1, [4])
    assert taps.rows_of(torch.arange(4), 4).tolist() == [2] * 4
    taps.begin_call(0, [])
    assert taps.rows_of(torch.arange(4), 4) is None


def test_a_layer_that_no_token_reaches_keeps_its_prior():
    """An image tower with experts of its own, in a model that is given text."""
    model = toy_model()
    model.tower = ToyMixture(model.config).double()
    layers = find_expert_layers(model)
    assert [layer.name for layer in layers][-1] == "tower.crew"
    batch = toy_batch(num_rows=4, seed=1)
    with pytest.warns(UserWarning, match=r"went through tower.crew, so the posterior of these layers is the prior"):
        factors = collect_factors(model, answer_logits, [batch], rank=4, layers=layers)
    assert float(factors.layers[-1].slots.sum()) == 0
    posterior = LaplacePosterior(factors)
    _, with_tower = posterior.logit_covariance(model, answer_logits, batch)
    without = posterior.without_layers([layers[-1].index])
    torch.testing.assert_close(without.logit_covariance(model, answer_logits, batch)[1], with_tower)
