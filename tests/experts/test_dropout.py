import pytest
import torch
from oracles.cases import in_layout, layouts
from oracles.dense import experts_modules
from oracles.models import answer_logits, tiny_qwen, toy_batch, toy_model

from bmoe_lightning.experts import expert_dropout, find_expert_layers, tapped_batch
from bmoe_lightning.experts.layouts.intercept import attached_state, expert_state


def built(layout):
    model = in_layout(toy_model(), layout)
    return model, find_expert_layers(model)


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@layouts
def test_without_seed_only_in_training(layout):
    model, layers = built(layout)
    batch = toy_batch()
    plain = answer_logits(model, batch)[0]
    with expert_dropout(model, layers, 0.4):
        assert torch.allclose(answer_logits(model, batch)[0], plain, rtol=1e-12)
        model.train()
        first, second = answer_logits(model, batch)[0], answer_logits(model, batch)[0]
        torch.manual_seed(5)
        third = answer_logits(model, batch)[0]
        torch.manual_seed(5)
        fourth = answer_logits(model, batch)[0]
    assert not torch.allclose(first, plain)
    assert not torch.allclose(first, second)
    assert torch.equal(third, fourth)
    assert torch.allclose(answer_logits(model, batch)[0], plain, rtol=1e-12)


@layouts
def test_seed_drops_in_every_mode_and_leaves_the_global_stream_alone(layout):
    model, layers = built(layout)
    batch = toy_batch()
    before = torch.get_rng_state()
    draws = []
    for seed in (1, 1, 2):
        with expert_dropout(model, layers, 0.3, seed=seed):
            draws.append([answer_logits(model, batch)[0] for _ in range(2)])
    assert torch.equal(torch.get_rng_state(), before)
    plain = answer_logits(model, batch)[0]
    assert not torch.allclose(draws[0][0], plain)
    assert torch.equal(torch.stack(draws[0]), torch.stack(draws[1]))
    assert not torch.allclose(draws[0][0], draws[0][1])  # the stream goes on from call to call
    assert not torch.allclose(draws[0][0], draws[2][0])


@layouts
@pytest.mark.parametrize("seed", [None, 3])
def test_what_is_dropped_and_how_the_rest_is_scaled(layout, seed):
    """The input of the second layer is zero with probability p and scaled by 1 / (1 - p) otherwise."""
    model, layers = built(layout)
    model.train()
    batch = toy_batch(num_rows=60, length=8)
    seen = {}

    def keep(name):
        class Tap:
            def record(self, inputs, experts, outputs, tokens, num_tokens):
                seen.setdefault(name, []).append(inputs.detach())
                return outputs

        return Tap()

    def inputs_of_first_layer(p):
        seen.clear()
        with expert_dropout(model, layers, p, seed=seed):
            if layout == "fused":
                with attached_state(experts_modules(model)[0], tap=keep("x")):
                    answer_logits(model, batch)
            else:
                handles = [
                    e.fall.register_forward_hook(lambda _m, x, _y: seen.setdefault("x", []).append(x[0].detach()))
                    for e in model.layers[0].mixture.crew
                ]
                answer_logits(model, batch)
                for handle in handles:
                    handle.remove()
        return torch.cat(seen["x"])

    whole, dropped = inputs_of_first_layer(0.0), inputs_of_first_layer(0.25)
    zero = dropped == 0
    count = zero.numel()
    assert abs(float(zero.double().mean()) - 0.25) < 4 * (0.25 * 0.75 / count) ** 0.5
    torch.testing.assert_close(dropped[~zero], whole[~zero] / 0.75, rtol=1e-12, atol=0)


@layouts
def test_a_tap_sees_what_the_second_layer_sees(layout):
    model, layers = built(layout)
    batch = toy_batch()
    with expert_dropout(model, layers, 0.5, seed=0), tapped_batch(model, layers, answer_logits, batch) as tapped:
        inputs = tapped.taps.slots(0).inputs
    assert 0.3 < float((inputs == 0).double().mean()) < 0.7


@layouts
def test_nothing_is_left_behind(layout):
    model, layers = built(layout)
    before = hooks(model)
    with pytest.raises(ZeroDivisionError), expert_dropout(model, layers, 0.5, seed=0):
        raise ZeroDivisionError
    assert hooks(model) == before
    assert all(expert_state(m) is None for m in model.modules())
    if layout == "fused":
        assert model.get_experts_implementation() == {"": "eager"}


def test_only_the_named_layers():
    model, layers = built("fused")
    with expert_dropout(model, layers[1:], 0.5, seed=0):
        states = [expert_state(m) for m in experts_modules(model)]
    assert states[0] is None
    assert states[1] is not None


def test_transformers_model_trains_through_it():
    model = tiny_qwen(dtype=torch.float32, implementation="grouped_mm").train()
    layers = find_expert_layers(model)
    with expert_dropout(model, layers, 0.1):
        answer_logits(model, toy_batch())[0].sum().backward()
    assert float(model.model.layers[0].mlp.experts.down_proj.grad.abs().sum()) > 0
    assert model.get_experts_implementation() == {"": "grouped_mm"}


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5])
def test_probability_out_of_range(p):
    model, layers = built("fused")
    with pytest.raises(ValueError, match=r"in \[0, 1\)"):
        expert_dropout(model, layers, p).__enter__()


@layouts
def test_of_nested_ones_the_innermost_counts(layout):
    model = in_layout(toy_model(), layout)
    layers, batch = find_expert_layers(model), toy_batch()
    plain = answer_logits(model, batch)[0]
    with expert_dropout(model, layers, 0.5, seed=1):
        dropped = answer_logits(model, batch)[0]
        with expert_dropout(model, layers, 0.0, seed=1):
            torch.testing.assert_close(answer_logits(model, batch)[0], plain)
    with expert_dropout(model, layers, 0.5, seed=1):
        assert torch.equal(answer_logits(model, batch)[0], dropped)
    torch.testing.assert_close(answer_logits(model, batch)[0], plain)
