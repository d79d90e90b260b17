"""Routers of a model whose weights FSDP2 shards: they are probed, sampled and fitted as those of a whole model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from forked_processes import run as run_in_processes
from oracles.models import tiny_qwen
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from bmoe_lightning.curvature import Curvature
from bmoe_lightning.methods import LaplaceRouterNoise, MeanFieldRouter, RouterNoise, evaluate, fit_methods
from bmoe_lightning.methods.fit_result import FittedMethod
from bmoe_lightning.routers import find_routers, probe_routers

NOISE = RouterNoise(num_samples=2, scales=(1.0,))
TRAINED = MeanFieldRouter(num_samples=2, epochs=2, learning_rate=0.01, prior_scale=1e-4, beta=1e-9)
SCORES = RouterNoise(name="of_scores", label="Of scores", average="scores", num_samples=2, scales=(1.0,))
TOGETHER = LaplaceRouterNoise(curvature=Curvature(rank=2), scope="global", num_samples=2, scales=(1.0,))


def class_logits(model, batch):
    logits = model(input_ids=batch["ids"], attention_mask=batch["mask"], use_cache=False).logits
    return logits[:, -1, [3, 5, 7]], batch["labels"]


def batch_of(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 30, (rows, 6), generator=generator)
    mask = (torch.arange(6) >= torch.randint(0, 4, (rows, 1), generator=generator)).long()
    return {"ids": ids, "mask": mask, "labels": torch.randint(0, 3, (rows,), generator=generator)}


def with_shards(rank, world_size):
    mesh = init_device_mesh("cpu", (world_size,))
    plain, sharded = tiny_qwen(), tiny_qwen()
    for block in sharded.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)

    def probed(model, batch):
        return probe_routers(model, find_routers(model), lambda: class_logits(model, batch)[0])

    # Each rank has other data.
    assert probed(sharded, batch_of(4 - rank, rank)) == probed(plain, batch_of(4, 0))

    training, held_out = batch_of(8, 1), batch_of(12, 2)
    methods = [NOISE, SCORES, TOGETHER]
    expected = fit_methods(methods, plain, class_logits, [training], [held_out])
    shards = [{name: values[rank::world_size] for name, values in data.items()} for data in (training, held_out)]
    found = fit_methods(methods, sharded, class_logits, [shards[0]], [shards[1]], distributed=True)
    for method in methods:
        torch.testing.assert_close(dict(found.state_of(method)), dict(expected.state_of(method)), rtol=1e-3, atol=1e-6)
    # Trained with noise that is too small to matter, since it differs between ranks.
    one, both = (
        fit_methods([TRAINED], model, class_logits, data, given, distributed=model is sharded).state_of(TRAINED)
        for model, data, given in ((plain, [training], [held_out]), (sharded, [shards[0]], [shards[1]]))
    )
    assert torch.equal(one["fingerprint"], both["fingerprint"])
    assert int(one["epoch"]) == int(both["epoch"]) == 2
    torch.testing.assert_close(both["net.1.shift"], one["net.1.shift"], rtol=0.05, atol=2e-3)
    assert one["net.1.shift"].abs().max() > 1e-2
    # The same numbers, so that predictions differ by rounding alone.
    fitted = replace(FittedMethod(one, TRAINED.fit_options()), warnings=())
    same = replace(expected, calibration=None, methods={**expected.methods, TRAINED.name: fitted})
    methods = [*methods, TRAINED]
    whole = evaluate(methods, same, plain, class_logits, [shards[1]])
    parts = evaluate(methods, same, sharded, class_logits, [shards[1]])
    for name, predictions in whole.items():
        torch.testing.assert_close(parts[name].log_probs, predictions.log_probs, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_sharded_by_fsdp2(tmp_path):
    run_in_processes(with_shards, 2, tmp_path)
