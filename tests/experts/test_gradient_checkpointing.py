"""Gradient checkpointing as transformers offers it saves memory in evaluation mode too, and changes nothing else."""

import copy
import gc

import pytest
import torch
from oracles.cases import answers, in_layout, layouts
from oracles.models import answer_logits, tiny_qwen, toy_batch, toy_model
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from bmoe_lightning.curvature import collect_factors
from bmoe_lightning.experts import find_expert_layers, tapped_batch
from bmoe_lightning.laplace import LaplacePosterior
from recipes.common.live_bytes import LiveBytes
from recipes.supported_models.tiny import build

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
BATCH = toy_batch()


def deep_qwen():
    return tiny_qwen(
        num_hidden_layers=8, hidden_size=32, moe_intermediate_size=16, shared_expert_intermediate_size=64, num_experts=8
    )


def long_batch(seed=1):
    return toy_batch(num_rows=6, length=40, seed=seed)


def covariance_of(model, class_logits, batch, **options):
    factors = collect_factors(model, class_logits, [batch], rank=3, **options)
    return factors, LaplacePosterior(factors).logit_covariance(model, class_logits, batch, centred=True)[1]


def assert_alike(found, expected):
    torch.testing.assert_close(found[1], expected[1], rtol=1e-12, atol=1e-14)
    for layer, wanted in zip(found[0].layers, expected[0].layers, strict=True):
        assert torch.equal(layer.slots, wanted.slots)
        for name in ("a_eigenvalues", "g_eigenvalues", "a_trace", "g_trace"):
            torch.testing.assert_close(getattr(layer, name), getattr(wanted, name), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_families(family, reentrant):
    tiny = build(family)
    batch = tiny.batches[0]
    calls = 0
    layer = tiny.model.get_decoder().layers[1]
    handle = layer.mlp.register_forward_pre_hook(lambda module, _: count(module))

    def count(module):
        nonlocal calls
        assert not module.training
        calls += 1

    expected = covariance_of(tiny.model, tiny.class_logits, batch)
    before, calls = calls, 0
    tiny.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    random = torch.get_rng_state()
    assert_alike(covariance_of(tiny.model, tiny.class_logits, batch), expected)
    assert torch.equal(torch.get_rng_state(), random)
    assert calls > before  # it did recompute
    handle.remove()


def test_the_model_is_as_it_was():
    model = deep_qwen().train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.model.layers[2].forward = own = model.model.layers[2].forward
    functions = [layer._gradient_checkpointing_func for layer in model.model.layers]

    def fails(m, batch):
        answer_logits(m, batch)
        raise KeyError("after the forward")

    with pytest.raises(KeyError), tapped_batch(model, find_expert_layers(model), fails, BATCH):
        pass
    covariance_of(model, answer_logits, BATCH)
    assert all(module.training for module in model.modules())
    assert [layer._gradient_checkpointing_func for layer in model.model.layers] == functions
    assert ["forward" in vars(layer) for layer in model.model.layers] == [i == 2 for i in range(8)]
    assert model.model.layers[2].forward is own
    assert model.get_input_embeddings()(BATCH["ids"]).requires_grad  # the hook that transformers put there


def test_a_way_of_checkpointing_of_the_users_own_is_kept_where_it_is_a_partial():
    """transformers' offloading of what is kept is one."""
    import functools

    model, seen = tiny_qwen(), []

    def own(function, *args, **options):
        seen.append(options)
        return checkpoint(function, *args, **options)

    expected = covariance_of(model, answer_logits, BATCH)
    model.gradient_checkpointing_enable()
    model._set_gradient_checkpointing(True, functools.partial(own, use_reentrant=True))
    assert_alike(covariance_of(model, answer_logits, BATCH), expected)
    assert seen[0] == {"use_reentrant": False, "preserve_rng_state": False}
    model._set_gradient_checkpointing(True, lambda function, *args: function(*args))
    assert_alike(covariance_of(model, answer_logits, BATCH), expected)


def test_offloaded_weights_leave_again():
    accelerate = pytest.importorskip("accelerate")
    model = tiny_qwen(num_hidden_layers=3)
    expected = covariance_of(model, answer_logits, BATCH)
    model.gradient_checkpointing_enable()
    accelerate.cpu_offload(model, execution_device="cpu")
    assert_alike(covariance_of(model, answer_logits, BATCH), expected)
    assert {parameter.device.type for parameter in model.model.layers.parameters()} == {"meta"}


def test_some_layers_only():
    model = tiny_qwen(num_hidden_layers=4)
    expected = covariance_of(model, answer_logits, BATCH)
    model.activation_checkpointing_enable(every_n_layers=2)
    assert_alike(covariance_of(model, answer_logits, BATCH), expected)


def test_caches_are_refused_rather_than_left_empty():
    """A prefix's keys and values would be missing from the second call."""
    model = tiny_qwen()

    def in_two_steps(m, batch):
        start = m(input_ids=batch["ids"][:, :3])
        cache = start.past_key_values
        end = m(input_ids=batch["ids"][:, 3:], past_key_values=copy.copy(cache))
        return end.logits[:, -1, :4], batch["labels"]

    covariance_of(model, in_two_steps, BATCH)
    model.gradient_checkpointing_enable()
    with pytest.raises(RuntimeError, match=r"cache of keys and values.*gradient_checkpointing_disable"):
        covariance_of(model, in_two_steps, BATCH)
    with pytest.raises(RuntimeError, match="cache of keys and values"):
        covariance_of(model, lambda m, b: (m(b["ids"], past_key_values=DynamicCache()).logits[:, -1, :4], None), BATCH)


def peaks(model):
    """Bytes at the peak of a curvature pass with one and with all backward passes, and of a prediction."""
    found = []
    batch = long_batch()
    for fisher in ("mc", "exact"):
        with LiveBytes() as live:
            live.known(model.parameters())
            factors = collect_factors(model, answer_logits, [batch], rank=2, fisher=fisher)
        found.append(live.peak)
    posterior = LaplacePosterior(factors)
    with LiveBytes() as live:
        live.known(model.parameters())
        posterior.predict(model, answer_logits, batch)
    return [*found, live.peak]


def test_memory_at_the_peak():
    model = deep_qwen()
    plain = peaks(model)
    model.gradient_checkpointing_enable()
    ratios = [before / after for before, after in zip(plain, peaks(model), strict=True)]
    print("peak beyond the weights, times less:", ratios)
    assert min(ratios[:2]) > 1.8
    assert ratios[2] > 1.5


@pytest.mark.parametrize("recompute", [False, True])
def test_a_batch_is_forgotten_before_the_next_one(recompute):
    """Without waiting for Python to look for cycles."""
    model = deep_qwen()
    if recompute:
        model.gradient_checkpointing_enable()
    found = []
    gc.collect()
    gc.disable()
    try:
        for count in (1, 4):
            with LiveBytes() as live:
                live.known(model.parameters())
                factors = collect_factors(model, answer_logits, [long_batch(i) for i in range(count)], rank=2)
            found.append(live.peak)
        posterior = LaplacePosterior(factors)
        posterior.predict(model, answer_logits, long_batch())
        for count in (1, 4):
            with LiveBytes() as live:
                live.known(model.parameters())
                for i in range(count):
                    posterior.predict(model, answer_logits, long_batch(i))
            found.append(live.peak)
    finally:
        gc.enable()
    assert found[1] < 1.1 * found[0]
    assert found[3] < 1.1 * found[2]


def checkpointed(model, layer, **options):
    """Have one layer recompute its activations, in evaluation mode too."""
    module = model.layers[layer]
    own = module.forward
    module.forward = lambda *inputs: checkpoint(own, *inputs, **options)
    return model


@layouts
@pytest.mark.parametrize("layer", [0, 1])
def test_recomputed_activations(layout, layer):
    """The first tapped layer is where the graph begins, so a leaf is made within what is recomputed."""
    factors, covariance = answers(checkpointed(in_layout(toy_model(), layout), layer, use_reentrant=False))
    expected_factors, expected = answers(in_layout(toy_model(), layout))
    torch.testing.assert_close(covariance, expected, rtol=1e-12, atol=1e-14)
    for found, wanted in zip(factors.layers, expected_factors.layers, strict=True):
        assert torch.equal(found.slots, wanted.slots)
        torch.testing.assert_close(found.g_eigenvalues, wanted.g_eigenvalues, rtol=1e-10, atol=1e-14)


@layouts
def test_slots_are_kept_once(layout):
    model = checkpointed(in_layout(toy_model(), layout), 1, use_reentrant=False)
    with tapped_batch(model, find_expert_layers(model), answer_logits, BATCH) as tapped:
        count = len(tapped.taps.slots(1).inputs)
        tapped.taps.gradients(tapped.logits, torch.ones_like(tapped.logits))
        assert len(tapped.taps.slots(1).inputs) == count


@layouts
def test_reentrant_checkpointing_is_refused(layout):
    model = checkpointed(in_layout(toy_model(), layout), 1, use_reentrant=True)
    with pytest.raises(RuntimeError, match=r"'layers.1.mixture.crew' ran without gradients.*use_reentrant=False works"):
        answers(model)


def test_transformers_gradient_checkpointing_is_no_hindrance():
    model = tiny_qwen()
    expected = answers(model)[1]
    model.gradient_checkpointing_enable()
    model.train()
    torch.testing.assert_close(answers(model)[1], expected)
    assert model.is_gradient_checkpointing
