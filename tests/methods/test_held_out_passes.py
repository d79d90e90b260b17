"""Further passes over the held-out data: ranks together, absent classes, and what is refused."""

from __future__ import annotations

import pytest
import torch
from forked_processes import run
from oracles.models import answer_logits, split, toy_batch, toy_model

from bmoe_lightning.experts.counted_batch import CountedBatch
from bmoe_lightning.methods import RouterNoise, fit_methods
from bmoe_lightning.methods.held_out_passes import HeldOutPasses


@pytest.mark.parametrize("count", [10, 1])  # with one example, a rank has no batch
def test_ranks_find_what_one_process_does(count, tmp_path):
    method, model = RouterNoise(num_samples=2, scales=(1.0, 4.0)), toy_model()
    batch = toy_batch(num_rows=count, seed=4)
    alone = fit_methods([method], model, answer_logits, [], [batch]).state_of(method)

    def rank(number, world_size):
        shard = {name: values[number::world_size] for name, values in batch.items()}
        size = len(shard["ids"])
        batches = split(shard, *[2] * (size // 2), *[1] * (size % 2))
        found = fit_methods([method], model, answer_logits, [], batches, distributed=True).state_of(method)
        torch.testing.assert_close(dict(found), dict(alone), rtol=1e-9, atol=0)

    run(rank, 2, tmp_path)


def test_log_probs_of_batches_with_other_numbers_of_classes():
    def narrow(model, batch):
        logits, labels = answer_logits(model, batch)
        return (logits[:, :3], labels % 3) if len(logits) == 2 else (logits, labels)

    model, batch = toy_model(), toy_batch(num_rows=5)
    passes = HeldOutPasses(model, narrow, split(batch, 2, 3), distributed=False, seed=0)
    found, labels = passes.log_probs(lambda view: torch.stack([view.logits.log_softmax(-1), view.logits]))
    assert found.shape == (2, 5, 4)
    assert (found[:, :2, 3] == -torch.inf).all()
    assert labels.tolist() == [*(batch["labels"][:2] % 3).tolist(), *batch["labels"][2:].tolist()]


def test_examples_that_a_sampler_repeats_are_not_counted():
    model, batch = toy_model(), toy_batch(num_rows=6)
    first = {name: values[:4] for name, values in batch.items()}
    plain = HeldOutPasses(model, answer_logits, [first], distributed=False, seed=0)
    padded = HeldOutPasses(model, answer_logits, [CountedBatch(batch, 4, 6)], distributed=False, seed=0)
    torch.testing.assert_close(plain.router_gaps(), padded.router_gaps(), rtol=1e-9, atol=0)
    one, other = (passes.log_probs(lambda view: view.logits.unsqueeze(0))[0] for passes in (plain, padded))
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_no_data_are_refused():
    with pytest.raises(ValueError, match="there are none; pass a calibration split"):
        HeldOutPasses(toy_model(), answer_logits, None, distributed=False, seed=0).check()


def test_no_labels_are_refused():
    batch = {name: values for name, values in toy_batch().items() if name != "labels"}
    passes = HeldOutPasses(toy_model(), answer_logits, [batch], distributed=False, seed=0)
    with pytest.raises(ValueError, match=r"return \(logits, labels\)"):
        passes.log_probs(lambda view: view.logits.unsqueeze(0))
