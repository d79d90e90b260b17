"""A rank whose `class_logits` fails alone where weights are sharded: nobody waits; real processes, over gloo."""

from __future__ import annotations

import pytest
import torch
from forked_processes import run
from oracles.models import answer_logits, split, toy_batch, toy_model
from torch.distributed.device_mesh import init_device_mesh

from bmoe_lightning.curvature import collect_factors
from bmoe_lightning.experts import find_expert_layers
from bmoe_lightning.experts.fsdp import shard_blocks
from bmoe_lightning.experts.logits_contract import run_class_logits
from bmoe_lightning.utils.distributed import OtherRankError, gather_number

BATCHES = split(toy_batch(num_rows=12, seed=3), 4, 4, 4)


def sharded(world_size):
    model = toy_model()
    shard_blocks(model, find_expert_layers(model), init_device_mesh("cpu", (world_size,)))
    return model


def before(model, batch):
    raise KeyError("no labels")


def after(model, batch):
    answer_logits(model, batch)
    raise KeyError("no labels")


def between(model, batch):
    """Of two calls, of which the others make both."""
    return answer_logits(model, batch) and before(model, batch)


def wrong(model, batch):
    return answer_logits(model, batch)[0].softmax(-1), batch["labels"]


def twice(model, batch):
    return answer_logits(model, batch) and answer_logits(model, batch)


def within(block):
    """Fails in the middle of a block, whose weights and those of the blocks below are all-gathered."""

    def class_logits(model, batch):
        def fail(*_):
            raise KeyError("no labels")

        handle = model.layers[block].mixture.register_forward_hook(fail)
        try:
            return answer_logits(model, batch)
        finally:
            handle.remove()

    return class_logits


@torch.no_grad()
def once(model, class_logits):
    run_class_logits(class_logits, model, BATCHES[0])


def in_a_pass(model, class_logits):
    return collect_factors(model, class_logits, BATCHES, rank=2, distributed=True)


def failing(rank, world_size):
    model = sharded(world_size)
    kinds = {before: answer_logits, after: answer_logits, between: twice, wrong: answer_logits}
    kinds |= {within(0): answer_logits, within(1): answer_logits}
    expected = None
    for mine, others in kinds.items():
        for ask in (once, in_a_pass):
            class_logits = mine if rank == 1 else others
            own, said = (ValueError, "probabilities") if mine is wrong else (KeyError, "no labels")
            with pytest.raises(own if rank == 1 else OtherRankError, match=said) as found:
                ask(model, class_logits)
            assert str(found.value).startswith("on rank 1: ") == (rank != 1)
            assert gather_number(rank) == list(range(world_size))
        slots = torch.cat([layer.slots for layer in in_a_pass(model, answer_logits).layers])
        assert expected is None or torch.equal(slots, expected)
        expected = slots


def calling_more_often(rank, world_size):
    model = sharded(world_size)
    with pytest.raises(ValueError, match="more often on some ranks"):
        once(model, twice if rank else answer_logits)
    once(model, twice)


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_all_ranks_raise(world_size, tmp_path):
    run(failing, world_size, tmp_path)


def test_calls_that_others_do_not_make_are_refused(tmp_path):
    run(calling_more_often, 2, tmp_path)


def test_nothing_is_asked_of_a_model_that_is_not_sharded():
    model = toy_model()
    run_class_logits(answer_logits, model, BATCHES[0])
    assert not model._forward_pre_hooks
