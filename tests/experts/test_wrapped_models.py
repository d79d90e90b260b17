"""Models that were compiled, or that recompute their activations."""

import pytest
import torch
from oracles.models import answer_logits, as_modules, tiny_qwen, toy_batch, toy_model
from torch.utils.checkpoint import checkpoint

from bmoe_lightning.curvature import collect_factors
from bmoe_lightning.experts import expert_dropout, find_expert_layers, find_linear_layers, tapped_batch
from bmoe_lightning.experts.discovery import locate_expert_layers
from bmoe_lightning.laplace import LaplacePosterior

layouts = pytest.mark.parametrize("layout", ["fused", "modules"])
BATCH = toy_batch()


def built(layout):
    model = toy_model()
    return model if layout == "fused" else as_modules(model)


def answers(model):
    factors = collect_factors(model, answer_logits, [BATCH], rank=3)
    return factors, LaplacePosterior(factors).logit_covariance(model, answer_logits, BATCH)[1]


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
    factors, covariance = answers(checkpointed(built(layout), layer, use_reentrant=False))
    expected_factors, expected = answers(built(layout))
    torch.testing.assert_close(covariance, expected, rtol=1e-12, atol=1e-14)
    for found, wanted in zip(factors.layers, expected_factors.layers, strict=True):
        assert torch.equal(found.slots, wanted.slots)
        torch.testing.assert_close(found.g_eigenvalues, wanted.g_eigenvalues, rtol=1e-10, atol=1e-14)


@layouts
def test_slots_are_kept_once(layout):
    model = checkpointed(built(layout), 1, use_reentrant=False)
    with tapped_batch(model, find_expert_layers(model), answer_logits, BATCH) as tapped:
        count = len(tapped.taps.slots(1).inputs)
        tapped.taps.gradients(tapped.logits, torch.ones_like(tapped.logits))
        assert len(tapped.taps.slots(1).inputs) == count


@layouts
def test_reentrant_checkpointing_is_refused(layout):
    model = checkpointed(built(layout), 1, use_reentrant=True)
    with pytest.raises(RuntimeError, match=r"'layers.1.mixture.crew' ran without gradients.*use_reentrant=False works"):
        answers(model)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_transformers_gradient_checkpointing_is_no_hindrance():
    model = tiny_qwen()
    expected = answers(model)[1]
    model.gradient_checkpointing_enable()
    model.train()
    torch.testing.assert_close(answers(model)[1], expected)
    assert model.is_gradient_checkpointing


@layouts
@pytest.mark.parametrize("in_place", [True, False])
def test_compiled_models_run_uncompiled_while_they_are_tapped(layout, in_place):
    plain = built(layout)
    expected = answers(plain)[1]
    compiled = 0

    def backend(graph, _inputs):
        nonlocal compiled
        compiled += 1
        return graph.forward

    torch.compiler.reset()
    try:
        if in_place:
            plain.compile(backend=backend)
            model = plain
        else:
            model = torch.compile(plain, backend=backend)
        before = answer_logits(model, BATCH)[0]
        graphs = compiled
        assert graphs > 0
        factors, covariance = answers(model)
        torch.testing.assert_close(covariance, expected)
        torch.testing.assert_close(answer_logits(model, BATCH)[0], before)
        assert compiled == graphs  # neither used nor thrown away
        locate_expert_layers(plain, factors.expert_layers)
    finally:
        torch.compiler.reset()


@layouts
def test_mc_dropout_reaches_a_compiled_model(layout):
    model = built(layout)
    layers = find_expert_layers(model)
    torch.compiler.reset()
    try:
        model.compile(backend="eager")
        plain = answer_logits(model, BATCH)[0]
        with expert_dropout(model, layers, 0.5, seed=0):
            dropped = answer_logits(model, BATCH)[0]
        assert not torch.allclose(dropped, plain)
        torch.testing.assert_close(answer_logits(model, BATCH)[0], plain)
    finally:
        torch.compiler.reset()


@pytest.mark.parametrize("in_place", [True, False])
def test_dropout_in_the_training_of_a_compiled_model(in_place):
    """Fused experts notice; hooks are passed by, which is refused rather than trained without dropout."""
    torch.compiler.reset()
    try:
        fused, modules = built("fused").train(), built("modules").train()
        if in_place:
            fused.compile(backend="eager")
            modules.compile(backend="eager")
        else:
            fused, modules = torch.compile(fused, backend="eager"), torch.compile(modules, backend="eager")
        plain = answer_logits(fused, BATCH)[0]
        with expert_dropout(fused, find_expert_layers(fused), 0.5):
            assert not torch.allclose(answer_logits(fused, BATCH)[0], plain)
        with (
            pytest.raises(ValueError, match=r"compiled code passes hooks by: train it without torch.compile"),
            expert_dropout(modules, find_expert_layers(modules), 0.5),
        ):
            pass
        linears = find_linear_layers(modules, "*.query")
        with pytest.raises(ValueError, match=r"compiled code passes hooks by"), expert_dropout(modules, linears, 0.5):
            pass
    finally:
        torch.compiler.reset()
