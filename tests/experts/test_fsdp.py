"""FSDP2 on one process, whose collectives are faked: which shard is here, and the private names that are read."""

from __future__ import annotations

import types

import pytest
import torch
import torch.distributed as dist
from oracles.models import toy_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from bmoe_lightning.experts import fsdp
from bmoe_lightning.experts.discovery import find_expert_layers
from bmoe_lightning.experts.fsdp import (
    check_collective,
    gathered,
    has_shards,
    is_sharded,
    local_part,
    reshard,
    runs_in_lockstep,
    shard_blocks,
    sharding_refusal,
    unsharded_class,
    unsharded_roots,
)


@pytest.fixture
def mesh():
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        yield init_device_mesh("cpu", (2,))
    finally:
        dist.destroy_process_group()


def sharded(mesh, **config):
    model = toy_model(**config)
    shard_blocks(model, find_expert_layers(model), mesh)
    return model


def test_unsharded_models():
    model = toy_model()
    part = local_part(model.head.weight)
    assert not has_shards(model)
    assert not runs_in_lockstep(model)
    assert (part.dim, part.offset, part.counts) == (0, 0, True)
    assert part.values.data_ptr() == model.head.weight.data_ptr()
    assert unsharded_class(model.head) is nn.Linear
    check_collective(model, distributed=False)
    with unsharded_roots(model):
        pass


def test_shards_of_a_rank(mesh):
    whole = toy_model(num_experts=5)
    model = sharded(mesh, num_experts=5)
    weight = model.layers[0].mixture.crew.down_proj
    part = local_part(weight)
    assert is_sharded(weight)
    assert sharding_refusal(weight) is None
    assert runs_in_lockstep(model)
    assert (part.dim, part.offset, len(part.values)) == (0, 3, 2)  # five experts are three and two
    reference = whole.layers[0].mixture.crew.down_proj.detach()
    assert torch.equal(part.of(reference), reference[3:])
    part.take(torch.zeros_like(reference))
    assert not local_part(weight).values.any()
    with pytest.raises(ValueError, match=r"sharded over 2 processes.*distributed=True"):
        check_collective(model, distributed=False)
    check_collective(model, distributed=True)
    assert list(gathered({"weight": weight}, keep=False)) == []
    reshard(model)


def test_private_names(mesh):
    model = sharded(mesh)
    assert type(model) is not unsharded_class(model)
    assert unsharded_class(model) is type(toy_model())
    assert [fsdp._reshards_after_backward(module) for module in (model, model.layers[0])] == [True, True]
    with unsharded_roots(model):
        assert [fsdp._reshards_after_backward(module) for module in (model, model.layers[0])] == [False, True]
    assert fsdp._reshards_after_backward(model) is True
    with pytest.raises(KeyError), unsharded_roots(model):  # before the first forward, which could not be reset
        raise KeyError
    assert not fsdp._has_run(model)
    model(input_ids=torch.zeros(1, 3, dtype=torch.long), attention_mask=torch.ones(1, 3, dtype=torch.long))
    assert fsdp._has_run(model)
    with pytest.raises(KeyError), unsharded_roots(model):
        raise KeyError
    assert fsdp._reshards_after_backward(model) is True


def test_sharding_again_changes_nothing(mesh):
    model = sharded(mesh)
    kinds = [type(module) for module in model.modules()]
    shard_blocks(model, find_expert_layers(model), mesh)
    assert [type(module) for module in model.modules()] == kinds


@pytest.mark.parametrize(
    ("placements", "size", "reason"),
    [
        (["Shard"], 1, None),
        (["Replicate", "Shard"], 1, None),
        (["Replicate"], 1, "parallel plan"),
        (["Shard", "Shard"], 1, "parallel plan"),
        (["_StridedShard", "Shard"], 1, "parallel plan"),
        (["Shard"], 2, "2 of 1 processes"),
    ],
)
def test_placements(placements, size, reason):
    tensor = types.SimpleNamespace(
        placements=[type(name, (), {})() for name in placements],
        device_mesh=types.SimpleNamespace(size=lambda: size),
    )
    found = sharding_refusal(tensor)
    assert found is None if reason is None else reason in found
