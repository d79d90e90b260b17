"""The logits of routers are replaced while a model runs, and nothing else is changed."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from oracles.cases import in_layout, layouts
from oracles.models import answer_logits, tiny_qwen, toy_batch, toy_model
from oracles.own_models import Chooser, OwnMixture, with_mixtures
from peft import LoraConfig, get_peft_model
from torch import nn

from bmoe_lightning.routers import find_routers, intercepted_routers
from recipes.supported_models.state import differences, state_of
from recipes.supported_models.tiny import build

BATCH = toy_batch()
# One of each kind of selection, and a gate that is a linear layer (the toy model below).
FAMILIES = (
    "granitemoe",
    "qwen2_moe",
    "qwen3_moe",
    "mixtral",
    "olmoe",
    "deepseek_v2",
    "deepseek_v3",
    "gpt_oss",
    "bmoe_lightning.deepseek_moe",
    # A linear layer inside the router, the weight of one, a subclass of one with a forward of its own, more logits.
    "afmoe",
    "longcat_flash",
    "phimoe",
    "zaya",
)


class Recorder:
    """Returns what a function makes of the logits, and keeps what it was given."""

    def __init__(self, function=lambda logits: logits):
        self.function = function
        self.calls = []

    def __call__(self, router, u, logits):
        self.calls.append((router, u, logits))
        return self.function(logits)


def alternating(logits):
    """Other logits, which change every choice."""
    return -logits


@pytest.mark.parametrize("family", FAMILIES)
class TestFamilies:
    def test_equal_logits_are_bitwise_the_model(self, family):
        tiny = build(family)
        routers = find_routers(tiny.model)
        state = {name: value.clone() for name, value in tiny.model.state_dict().items()}
        before = state_of(tiny.model)
        with torch.no_grad():
            for batch in tiny.batches:
                plain = tiny.class_logits(tiny.model, batch)[0]
                for same in (Recorder(), Recorder(torch.clone)):
                    with intercepted_routers(tiny.model, routers, same):
                        assert torch.equal(tiny.class_logits(tiny.model, batch)[0], plain)
                    tokens = batch["input_ids"].numel()
                    assert [router for router, _, _ in same.calls] == routers
                    for router, u, logits in same.calls:
                        assert u.shape == (tokens, router.d_in)
                        assert logits.shape == (tokens, router.num_experts)
                other = Recorder(alternating)
                with intercepted_routers(tiny.model, routers, other):
                    assert not torch.allclose(tiny.class_logits(tiny.model, batch)[0], plain, atol=1e-3)
                assert torch.equal(tiny.class_logits(tiny.model, batch)[0], plain)
        assert differences(before, state_of(tiny.model)) == ()
        after = tiny.model.state_dict()
        assert list(after) == list(state)
        assert all(torch.equal(after[name], value) for name, value in state.items())

    def test_logits_are_the_linear_map_of_the_input(self, family):
        tiny = build(family)
        routers = find_routers(tiny.model)
        seen = Recorder()
        with torch.no_grad(), intercepted_routers(tiny.model, routers, seen):
            tiny.class_logits(tiny.model, tiny.batches[0])
        for router, u, logits in seen.calls:
            module = tiny.model.get_submodule(router.name)
            shape = router.num_experts, router.d_in
            (weight,) = [p for p in module.parameters() if tuple(p.shape) == shape]
            biases = [p for p in module.parameters() if tuple(p.shape) == shape[:1]]
            expected = u @ weight.to(u.dtype).T + (biases[0] if biases and family in ("gpt_oss", "zaya") else 0)
            torch.testing.assert_close(logits, expected)


class TestLinearLayers:
    @layouts
    def test_a_user_s_gate(self, layout):
        model = in_layout(toy_model(), layout)
        routers = find_routers(model)
        plain = answer_logits(model, BATCH)[0]
        for same in (Recorder(), Recorder(torch.clone)):
            with intercepted_routers(model, routers, same):
                assert torch.equal(answer_logits(model, BATCH)[0], plain)
            assert len(same.calls) == 2
        with intercepted_routers(model, routers[:1], Recorder(alternating)):
            changed = answer_logits(model, BATCH)[0]
        expected = copy.deepcopy(model)
        expected.layers[0].mixture.router.weight.data.neg_()
        torch.testing.assert_close(changed, answer_logits(expected, BATCH)[0])

    def test_adapters_belong_to_the_logits(self):
        model = get_peft_model(toy_model(), LoraConfig(target_modules=["router"], r=3, init_lora_weights=False)).eval()
        plain = answer_logits(model, BATCH)[0]
        seen = Recorder(torch.zeros_like)
        with intercepted_routers(model, find_routers(model), seen):
            replaced = answer_logits(model, BATCH)[0]
        zero = toy_model()
        for layer in zero.layers:
            layer.mixture.router.weight.data.zero_()
        torch.testing.assert_close(replaced, answer_logits(zero, BATCH)[0])
        router, u, logits = seen.calls[0]
        torch.testing.assert_close(logits, model.get_submodule(router.name)(u))
        assert torch.equal(answer_logits(model, BATCH)[0], plain)

    def test_adapters_inside_a_router(self):
        tiny = build("afmoe")
        config = LoraConfig(target_modules=r".*\.router\.gate", r=3, init_lora_weights=False)
        model = get_peft_model(tiny.model, config).eval()
        routers = find_routers(model)
        seen = Recorder(torch.zeros_like)
        with torch.no_grad(), intercepted_routers(model, routers, seen):
            tiny.class_logits(model, tiny.batches[0])
        assert len(seen.calls) == len(routers) == 2
        router, u, logits = seen.calls[0]
        torch.testing.assert_close(logits, model.get_submodule(router.name).gate(u))

    def test_tied_routers_are_replaced_together(self):
        model = with_mixtures(OwnMixture)
        first, second = (layer.mixture for layer in model.layers)
        second.chooser.weight, second.chooser.bias = first.chooser.weight, first.chooser.bias
        seen = Recorder()
        (router, _) = find_routers(model)
        with intercepted_routers(model, [router], seen):
            answer_logits(model, BATCH)
        assert [found for found, _, _ in seen.calls] == [router, router]
        second.chooser = first.chooser  # one module
        (router,) = find_routers(model)
        with intercepted_routers(model, [router], seen):
            answer_logits(model, BATCH)
        assert len(seen.calls) == 4


@pytest.fixture(params=["module", "linear layer"])
def case(request):
    """A model of each kind of router, its routers, and a function that runs it."""
    model = tiny_qwen() if request.param == "module" else toy_model()
    return model, find_routers(model), lambda: answer_logits(model, BATCH)[0]


class TestContexts:
    def test_the_inner_one_gets_what_the_outer_one_returned(self, case):
        model, routers, run = case
        outer, inner = Recorder(lambda logits: logits + 1), Recorder(lambda logits: 3 * logits)
        with intercepted_routers(model, routers, outer), intercepted_routers(model, routers, inner):
            run()
        torch.testing.assert_close(inner.calls[0][2], outer.calls[0][2] + 1)
        assert len(outer.calls) == len(inner.calls) == 2
        expected = Recorder(lambda logits: 3 * (logits + 1))
        with intercepted_routers(model, routers, expected):
            run()
        torch.testing.assert_close(inner.calls[1][2], outer.calls[1][2] + 1)
        torch.testing.assert_close(outer.calls[1][2], expected.calls[1][2])

    def test_nothing_is_left_after_an_exception(self, case):
        model, routers, run = case
        plain, before, keys = run(), state_of(model), list(model.state_dict())

        def failing(router, u, logits):
            raise KeyboardInterrupt if router.index else ValueError("not today")

        for chosen, error in ((routers, ValueError), (routers[1:], KeyboardInterrupt)):
            with pytest.raises(error), intercepted_routers(model, chosen, failing):
                run()
        assert torch.overrides._len_torch_function_stack() == 0
        assert differences(before, state_of(model)) == ()
        assert list(model.state_dict()) == keys
        assert torch.equal(run(), plain)

    def test_an_exception_inside_the_model_and_on(self, case):
        model, routers, run = case
        plain = run()
        hooks = [
            model.get_submodule(routers[0].name).register_forward_pre_hook(_raise),
            model.get_submodule(routers[1].name).register_forward_hook(_raise),
        ]
        seen = Recorder(torch.clone)
        with intercepted_routers(model, routers, seen):
            for hook in hooks:
                with pytest.raises(ValueError, match="a hook"):
                    run()
                hook.remove()
            assert torch.overrides._len_torch_function_stack() == 0
            assert torch.equal(run(), plain)
        assert torch.equal(run(), plain)

    def test_other_threads_run_the_model(self, case):
        model, routers, run = case
        plain, found = run(), []
        with intercepted_routers(model, routers, Recorder(alternating)):
            thread = threading.Thread(target=lambda: found.append(run()))
            thread.start()
            thread.join()
            assert not torch.equal(run(), plain)
        assert torch.equal(found[0], plain)
        with intercepted_routers(model, routers, Recorder(alternating), everywhere=True):
            changed = run()
            thread = threading.Thread(target=lambda: found.append(run()))
            thread.start()
            thread.join()
        assert torch.equal(found[1], changed)

    def test_a_copy_made_meanwhile_is_the_model_afterwards(self, case):
        model, routers, run = case
        plain = run()
        with intercepted_routers(model, routers, Recorder(alternating)):
            copied = copy.deepcopy(model)
        assert torch.equal(answer_logits(copied, BATCH)[0], plain)

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            (
                lambda logits: logits[1:],
                r"were replaced by torch.float64 \(34, 4\), and it gave torch.float64 \(35, 4\)",
            ),
            (lambda logits: logits.float(), r"replaced by torch.float32 \(35, 4\)"),
        ],
    )
    def test_other_shapes_and_dtypes(self, case, wrong, message):
        model, routers, run = case
        with pytest.raises(RuntimeError, match=message), intercepted_routers(model, routers, Recorder(wrong)):
            run()


class TestGradients:
    def test_they_reach_what_is_returned(self, case):
        model, routers, run = case
        shift = torch.zeros(4, dtype=torch.float64, requires_grad=True)
        with intercepted_routers(model, routers, Recorder(lambda logits: logits + shift * logits)):
            run()[:, 0].sum().backward()
        step, values = 1e-3, []
        for sign in (1, -1):
            moved = torch.tensor([sign * step, 0, 0, 0], dtype=torch.float64)
            with torch.no_grad(), intercepted_routers(model, routers, Recorder(lambda z, by=moved: z + by * z)):
                values.append(run()[:, 0].sum())
        # Norms and router scores of Qwen are in float32.
        torch.testing.assert_close(shift.grad[0], (values[0] - values[1]) / (2 * step), rtol=0.02, atol=1e-2)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_recomputed_activations_get_the_same_logits(self, reentrant):
        gradients = []
        for checkpointed in (False, True):
            model = tiny_qwen(num_hidden_layers=2).train()
            if checkpointed:
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            noise = torch.randn(35, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
            seen = Recorder(lambda logits, noise=noise: logits + noise)
            with intercepted_routers(model, find_routers(model), seen, everywhere=True):
                answer_logits(model, BATCH)[0][:, 0].sum().backward()
            assert torch.overrides._len_torch_function_stack() == 0
            assert len(seen.calls) == (4 if checkpointed else 2)
            gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other)


class TestRefused:
    def test_logits_by_no_linear_map(self):
        model = with_mixtures(OwnMixture)
        for layer in model.layers:
            layer.mixture.chooser = Chooser().double()
        routers = find_routers(model)
        message = (
            r"the router 'layers.0.mixture.chooser' \(Chooser\) made its logits by no calls of torch.nn.functional"
        )
        with pytest.raises(RuntimeError, match=message), intercepted_routers(model, routers, Recorder()):
            answer_logits(model, BATCH)

    def test_logits_by_two_linear_maps(self):
        class Chooser(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.second = nn.Linear(6, 4), nn.Linear(6, 4)

            def forward(self, x):
                return self.first(x) + self.second(x)

        model = with_mixtures(OwnMixture)
        for layer in model.layers:
            layer.mixture.chooser = Chooser().double()
        with (
            pytest.raises(RuntimeError, match=r"by 2 calls of torch.nn.functional.linear with 4 outputs"),
            intercepted_routers(model, find_routers(model), Recorder()),
        ):
            answer_logits(model, BATCH)

    def test_compiled_models(self):
        plain = toy_model(num_layers=1)
        expected = answer_logits(plain, BATCH)[0]
        torch.compiler.reset()
        try:
            model = torch.compile(plain, backend="eager")
            answer_logits(model, BATCH)
            routers, seen = find_routers(model), Recorder(alternating)
            with intercepted_routers(model, routers, seen):
                assert not torch.allclose(answer_logits(model, BATCH)[0], expected)
            assert len(seen.calls) == 1
            torch.testing.assert_close(answer_logits(model, BATCH)[0], expected)
            with (
                pytest.raises(ValueError, match="train this model without torch"),
                intercepted_routers(model, routers, seen, everywhere=True),
            ):
                pass
        finally:
            torch.compiler.reset()


def _raise(*_):
    raise ValueError("a hook")
