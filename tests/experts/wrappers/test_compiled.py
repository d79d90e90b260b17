"""Models that were compiled: taps and dropout reach them, and what was compiled stays."""

import pytest
import torch
from oracles.cases import answers, in_layout, layouts
from oracles.models import answer_logits, toy_batch, toy_model
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from bmoe_lightning.experts import (
    expert_dropout,
    find_expert_layers,
    find_linear_layers,
)
from bmoe_lightning.experts.discovery import locate_expert_layers
from bmoe_lightning.experts.wrappers.compiled import CHECKPOINTED_MODULE, COMPILED_MODULE, is_compiled

BATCH = toy_batch()


def built(layout):
    return in_layout(toy_model(), layout)


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
            pytest.raises(ValueError, match=r"compiled code skips hooks: train it without torch.compile"),
            expert_dropout(modules, find_expert_layers(modules), 0.5),
        ):
            pass
        linears = find_linear_layers(modules, "*.query")
        with pytest.raises(ValueError, match=r"compiled code skips hooks"), expert_dropout(modules, linears, 0.5):
            pass
    finally:
        torch.compiler.reset()


def test_private_names():
    linear = torch.nn.Linear(2, 2)
    assert not is_compiled(linear)
    assert dict(torch.compile(linear).named_children()) == {COMPILED_MODULE: linear}
    assert dict(checkpoint_wrapper(linear).named_children()) == {CHECKPOINTED_MODULE: linear}
    assert is_compiled(torch.nn.Sequential(torch.compile(linear)))
    assert not is_compiled(linear)
    linear.compile(backend="eager")
    assert is_compiled(torch.nn.Sequential(linear))
