"""A batch that does not fit in memory: curvature, predictions and logits of its parts are those of the batch."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from oracles.models import answer_logits, split, toy_batch, toy_model
from torch import nn

from bmoe_lightning.curvature import collect_factors, pass_sums
from bmoe_lightning.curvature.layer_sums import LayerSums
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
    # The batch and its first part once more without a graph; the second batch is not tried as a whole.
    assert scarce.calls == [7, 7, 4, 4, 2, 2, 2, 1, 2, 2, 2, 1]


@pytest.mark.parametrize("sketch", ["exact", "nystrom"])
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


def test_a_sketch_that_depends_on_the_batches_is_not_cut():
    with pytest.raises(torch.OutOfMemoryError):
        factors(Scarce(4), sketch="rsvd")


def test_what_a_resumed_pass_has_summed_is_not_lost(tmp_path, monkeypatch):
    path = tmp_path / "curvature.safetensors"

    def killed():
        yield BATCHES[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        factors(batches=killed(), checkpoint=path, checkpoint_every=1)
    restore, calls = LayerSums.load_state, []

    def scarce(self, state):
        calls.append(0)
        if len(calls) == 2:
            raise NO_MEMORY
        restore(self, state)

    monkeypatch.setattr(LayerSums, "load_state", scarce)
    assert_close(factors(checkpoint=path), factors(), rtol=1e-9, atol=1e-12)


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
    assert (
        "9 examples do not fit in memory in a linearised prediction: batches of this size run in parts of 5"
        in caplog.text
    )
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


def forward(class_logits, most, calls=None):
    """Runs a batch, for which there is no memory beyond some rows of logits."""
    calls = [] if calls is None else calls

    def run(batch):
        logits, _ = class_logits(None, batch)
        calls.append(len(logits))
        if len(logits) > most:
            raise NO_MEMORY
        return logits

    return run


def in_parts(class_logits, batch, most, calls=None, model=None):
    model = nn.Identity() if model is None else model
    run = forward(class_logits, most, calls)
    return run_in_parts(model, class_logits, batch, run, lambda logits: logits, work="forward pass")


def test_other_errors_are_raised():
    def refused(batch):
        raise ValueError("too small")

    with pytest.raises(ValueError, match="too small"):
        run_in_parts(nn.Identity(), answer_logits, {"ids": torch.zeros(4, 2)}, refused, len, work="forward pass")


def numbers(values):
    """Logits `[B, 3]` of numbers."""
    values = torch.as_tensor(values, dtype=torch.float64)
    return torch.stack([values, -values, values.square()], dim=1), None


@pytest.mark.parametrize(
    ("batch", "class_logits"),
    [
        (
            {"ids": torch.arange(6).view(6, 1), "scale": torch.tensor(2.0), "names": list("abcdef")},
            lambda _, batch: numbers(batch["ids"][:, 0] * batch["scale"]),
        ),
        ([torch.arange(6), np.arange(6.0)], lambda _, batch: numbers(batch[0] + torch.as_tensor(batch[1]))),
        (SimpleNamespace(ids=torch.arange(6), table=torch.ones(3, 2)), lambda _, batch: numbers(batch.ids)),
        (["one", "three", "eleven", "x", "yy", "zzzz"], lambda _, batch: numbers([len(text) for text in batch])),
        ([{"length": n} for n in range(6)], lambda _, batch: numbers([entry["length"] for entry in batch])),
        (
            {"ids": torch.arange(6), "words": [["a"] * n for n in range(1, 7)]},
            lambda _, batch: numbers(batch["ids"] + torch.tensor([len(words) for words in batch["words"]])),
        ),
    ],
    ids=["mapping", "columns", "object", "texts", "mappings", "lists"],
)
def test_any_batch_with_rows_is_cut(batch, class_logits):
    found = in_parts(class_logits, batch, 3)
    assert [len(part) for part in found] == [3, 3]
    assert torch.equal(torch.cat(found), class_logits(None, batch)[0])


class TestCannotBeCut:
    def test_rows_that_are_no_examples(self):
        def pairs(_, batch):
            return numbers(batch["ids"].view(-1, 2).sum(1))

        with pytest.raises(ValueError, match="gives 2 examples for 4 rows, and 4 in all; make batches of fewer"):
            in_parts(pairs, {"ids": torch.arange(8)}, 3)

    def test_a_tensor_of_each_example(self):
        def means(_, batch):
            return numbers([float(ids.double().mean()) for ids in batch["ids"]])

        with pytest.raises(torch.OutOfMemoryError):
            in_parts(means, {"ids": [torch.arange(8) + n for n in range(4)]}, 3)

    def test_a_table_with_as_many_rows_as_examples(self):
        def chosen(_, batch):
            return torch.outer(batch["ids"].double(), torch.arange(9.0).double())[:, batch["classes"]], None

        batch = {"ids": torch.arange(1, 5), "mask": torch.ones(4, 2), "classes": torch.tensor([1, 4, 5, 8])}
        with pytest.raises(ValueError, match="gives other logits for the same example in a smaller batch"):
            in_parts(chosen, batch, 2)

    @pytest.mark.parametrize("most", [1, 2])
    def test_examples_that_depend_on_others(self, most):
        def mixed(_, batch):
            values = batch["ids"].double()
            return numbers(values - values.mean())

        with pytest.raises(ValueError, match="gives other logits for the same example in a smaller batch"):
            in_parts(mixed, {"ids": torch.arange(4)}, most)

    def test_code_that_takes_whole_batches(self):
        def whole(_, batch):
            if len(batch["ids"]) != 4:
                raise KeyError("four")
            return numbers(batch["ids"])

        with pytest.raises(ValueError, match="does not take a part of it"):
            in_parts(whole, {"ids": torch.arange(4)}, 2)

    def test_a_batch_without_rows(self):
        def never(_, batch):
            raise NO_MEMORY

        with pytest.raises(torch.OutOfMemoryError):
            in_parts(never, "one text", 2)


def test_where_not_even_logits_of_the_batch_fit_one_example_is_compared():
    calls = []

    def scarce(_, batch):
        calls.append(len(batch["ids"]))
        if len(batch["ids"]) > 3:
            raise NO_MEMORY
        return numbers(batch["ids"])

    found = in_parts(scarce, {"ids": torch.arange(6)}, 3)
    assert [len(part) for part in found] == [3, 3]
    assert calls == [6, 6, 3, 1, 3, 3]

    def mixed(_, batch):
        values = batch["ids"].double()
        return scarce(None, {"ids": values - values.mean()})

    with pytest.raises(ValueError, match="other logits for the same example"):
        in_parts(mixed, {"ids": torch.arange(6)}, 3)


def test_shorter_batches_are_tried_as_a_whole():
    model, calls = nn.Identity(), []

    def class_logits(_, batch):
        if batch["ids"].numel() > 40:
            raise NO_MEMORY
        return numbers(batch["ids"][:, 0])

    def run(batch):
        calls.append(len(batch["ids"]))
        return class_logits(None, batch)[0]

    def parts(batch):
        return run_in_parts(model, class_logits, batch, run, lambda logits: logits, work="forward pass")

    assert [len(part) for part in parts({"ids": torch.arange(8).view(8, 1).expand(8, 10)})] == [4, 4]
    calls.clear()
    assert len(parts({"ids": torch.arange(16).view(16, 1).expand(16, 2)})) == 1
    assert calls == [16]
    calls.clear()
    assert len(parts({"ids": torch.arange(8).view(8, 1).expand(8, 10)})) == 2
    assert calls == [4, 4]  # not tried in vain again
