"""What plain forward passes tell of data."""

from __future__ import annotations

import pytest
import torch
from oracles.models import answer_logits, split, toy_batch, toy_model

from bmoe_lightning.experts.counted_batch import CountedBatch
from bmoe_lightning.experts.data_record import record_of
from bmoe_lightning.methods.plain_passes import NO_EXAMPLES, Counts, PlainPasses

MODEL = toy_model(num_layers=1)
BATCH = toy_batch(num_rows=10, seed=3)
LOGITS = answer_logits(MODEL, BATCH)[0].detach()
BATCHES = split(BATCH, 4, 4, 2)


@pytest.fixture
def passes():
    return PlainPasses(MODEL, answer_logits, distributed=False)


def without_labels(model, batch):
    return answer_logits(model, batch)[0], None


def test_logits_and_labels_in_order(passes):
    logits, labels = passes.split(BATCHES)
    torch.testing.assert_close(logits, LOGITS)
    assert torch.equal(labels, BATCH["labels"])
    assert PlainPasses(MODEL, without_labels, distributed=False).split(BATCHES)[1] is None
    with pytest.raises(ValueError, match=NO_EXAMPLES):
        passes.split([])


def test_repeated_examples_are_left_out(passes):
    repeated = [BATCHES[0], CountedBatch(BATCHES[1], 3, 4)]
    assert len(passes.split(repeated)[0]) == 7
    assert passes.counts(repeated, 2, labelled=True).examples == 7
    assert passes.record(repeated).num_examples == 7


def test_counts(passes):
    assert passes.counts(BATCHES, 2, labelled=True) == Counts(8, 0, 8, 2)
    assert passes.counts(BATCHES, 5, labelled=True) == Counts(10, 0, 10, 3)
    unlabelled = PlainPasses(MODEL, without_labels, distributed=False)
    assert unlabelled.counts(BATCHES, 2, labelled=True) == Counts(8, 8, 8, 2)
    wrong = [{**BATCH, "labels": BATCH["labels"] + 4}]
    assert passes.counts(wrong, 1, labelled=False).examples == 10
    with pytest.raises(ValueError, match="K = 4"):
        passes.counts(wrong, 1, labelled=True)


def test_records(passes):
    expected = record_of(LOGITS, BATCH["labels"])
    found, (logits, labels) = passes.record_and_split(BATCHES, max_batches=None)
    for record in (passes.record(BATCHES), found):
        assert record.difference(expected) == ""
        assert torch.equal(record.counts, expected.counts)
    assert passes.record(BATCHES, 2).num_examples == 8
    assert passes.record_and_split(BATCHES, max_batches=3)[0].max_batches == 3
    torch.testing.assert_close(logits, LOGITS)
    assert torch.equal(labels, BATCH["labels"])


def test_a_seed_orders_what_torch_draws_and_leaves_its_state(passes):
    class Drawn:
        def __iter__(self):
            return iter(split({name: x[torch.randperm(10)] for name, x in BATCH.items()}, 10))

    state = torch.get_rng_state()
    first, again, other = (passes.record_and_split(Drawn(), max_batches=None, seed=s)[1][0] for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
