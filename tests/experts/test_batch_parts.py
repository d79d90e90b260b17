"""A batch that does not fit in memory: curvature, predictions and logits of its parts are those of the batch."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from oracles.models import answer_logits, split, toy_batch, toy_model

from bmoe_lightning.curvature import collect_factors, pass_sums
from bmoe_lightning.experts.batch_parts import run_in_parts
from bmoe_lightning.experts.counted_batch import CountedBatch
from bmoe_lightning.laplace import LaplacePosterior
from bmoe_lightning.methods import BatchView

BATCHES = split(toy_batch(num_rows=14, seed=3), 7, 7)
NO_MEMORY = torch.OutOfMemoryError("XPU out of memory. Tried to allocate 2.00 GiB")


@dataclass
class Scarce:
    """Logits of at most so many rows, beyond which there is no memory for a graph, or for logits at all."""

    most: int
    with_graph: bool = True

    def __call__(self, model, batch):
        self.calls = [*getattr(self, "calls", []), len(batch["ids"])]
        if len(batch["ids"]) > self.most and (torch.is_grad_enabled() or not self.with_graph):
            raise NO_MEMORY
        return answer_logits(model, batch)


def factors(class_logits=answer_logits, batches=BATCHES, **options):
    return collect_factors(toy_model(), class_logits, batches, rank=3, **options)


def assert_close(found, expected, **tolerance):
    for one, other in zip(found.layers, expected.layers, strict=True):
        for name, value in one.tensors().items():
            if "basis" not in name:  # whose columns have no sign
                torch.testing.assert_close(value, other.tensors()[name], **tolerance)


@pytest.mark.parametrize("fisher", ["exact", "mc", "empirical"])
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_the_curvature_of_parts_is_that_of_the_batch(fisher, approximation, caplog):
    options = {"fisher": fisher, "approximation": approximation}
    scarce = Scarce(2)
    with caplog.at_level(logging.WARNING):
        found = factors(scarce, **options)
    assert_close(found, factors(**options), rtol=1e-9, atol=1e-12)
    assert found.num_examples == 14
    sentences = [record.message for record in caplog.records if "do not fit" in record.message]
    assert [sentence.split(" ")[0] for sentence in sentences] == ["7", "4"]
    assert scarce.calls == [7, 4, 2, 2, 2, 1, 2, 2, 2, 1]  # the second batch is not tried as a whole


@pytest.mark.parametrize("sketch", ["exact", "nystrom", "rsvd"])
def test_what_was_added_before_the_memory_was_used_up_is_taken_back(sketch, monkeypatch):
    expected = factors(batches=[*split(BATCHES[0], 4, 3), *split(BATCHES[1], 4, 3)], sketch=sketch, fisher="mc")
    monkeypatch.setattr(pass_sums, "answers_at_once", lambda device: False)
    add, calls = pass_sums._add_batch, []

    def scarce(sums, tapped, slots, weights, approximation, **options):
        calls.append(len(tapped.logits))
        add(sums, tapped, slots, weights, approximation, **options)
        if len(tapped.logits) > 4:
            raise NO_MEMORY

    monkeypatch.setattr(pass_sums, "_add_batch", scarce)
    found = factors(sketch=sketch, fisher="mc")
    assert calls == [7, 4, 3, 4, 3]
    assert_close(found, expected, rtol=0, atol=0)


def test_what_cannot_be_taken_back_is_no_curvature(monkeypatch):
    def scarce(*_, **__):
        raise NO_MEMORY

    monkeypatch.setattr(pass_sums, "_add_batch", scarce)
    with pytest.raises(RuntimeError, match="part of them is in its sums; make smaller batches"):
        factors()


def test_the_prediction_of_parts_is_that_of_the_batch(caplog):
    model, batch = toy_model(), toy_batch(num_rows=9, seed=5)
    batch["absent"] = torch.zeros(9, 4, dtype=torch.bool)
    batch["absent"][:5, 3] = True  # the first part has one contrast less
    posterior = LaplacePosterior(factors(), 2.0)
    expected = posterior.batch_terms(model, answer_logits, batch)
    shares = posterior.attribute(model, answer_logits, batch)
    found = posterior.batch_terms(model, Scarce(5), batch)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-12, atol=1e-12)
    assert torch.equal(found.labels, expected.labels)
    torch.testing.assert_close(
        posterior.covariance_of(found), posterior.covariance_of(expected), rtol=1e-10, atol=1e-14
    )
    assert "9 examples do not fit in memory in a linearised prediction: batches run in parts of 5" in caplog.text
    again = posterior.attribute(model, Scarce(5), batch)
    torch.testing.assert_close(again.by_layer, shares.by_layer, rtol=1e-10, atol=1e-14)
    counted = posterior.batch_terms(model, Scarce(5), CountedBatch(batch, 6, 9))
    torch.testing.assert_close(
        posterior.covariance_of(counted), posterior.covariance_of(expected)[:6], rtol=1e-10, atol=1e-14
    )


def test_the_variance_of_texts_of_parts_is_that_of_the_batch():
    model, batch = toy_model(), toy_batch(num_rows=7, seed=5)
    posterior = LaplacePosterior(factors(), 2.0)

    def log_prob(model, batch):
        logits, labels = answer_logits(model, batch)
        return logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]

    def scarce(model, batch):
        value = log_prob(model, batch)
        if len(batch["ids"]) in (7, 3):  # of the whole, and of the second half
            raise NO_MEMORY
        return value

    expected, found = (posterior.sequence_variance(model, function, batch) for function in (log_prob, scarce))
    torch.testing.assert_close(found.log_prob, expected.log_prob, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.variance, expected.variance, rtol=1e-10, atol=1e-14)


def test_the_logits_of_parts_are_those_of_the_batch():
    model, batch = toy_model(), toy_batch(num_rows=9)
    view = BatchView(model, Scarce(3, with_graph=False), batch)
    expected = BatchView(model, answer_logits, batch).logits
    torch.testing.assert_close(view.logits, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(view.labels, batch["labels"])


def test_no_memory_for_one_example_is_said_as_it_is():
    with pytest.raises(torch.OutOfMemoryError, match="XPU out of memory"):
        factors(Scarce(0))
    with pytest.raises(ValueError, match="too small"):
        run_in_parts(toy_model(), {"ids": torch.zeros(4, 2)}, refused, len, work="forward pass")


def refused(batch):
    raise ValueError("too small")


@pytest.mark.parametrize(
    "batch",
    [
        {"ids": torch.arange(6).view(6, 1), "scale": torch.tensor(2.0), "names": list("abcdef")},
        [torch.arange(6), np.arange(6.0)],
        SimpleNamespace(ids=torch.arange(6), table=torch.zeros(3, 2)),
        ["one", "two", "three", "four", "five", "six"],
    ],
    ids=["mapping", "list", "object", "texts"],
)
def test_any_batch_with_rows_is_cut(batch):
    sizes = []

    def run(part):
        first = next(iter(part.values())) if isinstance(part, dict) else getattr(part, "ids", part)
        rows = len(first[0]) if isinstance(first, list) and not isinstance(first[0], str) else len(first)
        if rows > 3:
            raise NO_MEMORY
        sizes.append(rows)
        return rows

    assert run_in_parts(toy_model(), batch, run, lambda rows: rows, work="forward pass") == [3, 3]


def test_rows_that_are_no_examples_are_refused():
    def run(part):
        if len(part["ids"]) > 4:
            raise NO_MEMORY
        return torch.zeros(len(part["ids"]) // 2, 4)  # two rows an example

    with pytest.raises(ValueError, match=r"gives 2 examples for 4 of them, so the batch cannot be cut"):
        run_in_parts(toy_model(), {"ids": torch.zeros(8, 3)}, run, len, work="forward pass")


def test_a_batch_without_rows_is_not_cut():
    def run(batch):
        raise NO_MEMORY

    with pytest.raises(torch.OutOfMemoryError):
        run_in_parts(toy_model(), "one text", run, len, work="forward pass")
