"""A rank that fails alone where weights are sharded, anywhere: nobody waits; real processes, over gloo."""

from __future__ import annotations

import pytest
import torch
from forked_processes import run
from oracles.models import answer_logits, split, toy_batch, toy_model
from torch.distributed.device_mesh import init_device_mesh

from bmoe_lightning import LaplacePosterior
from bmoe_lightning.curvature import Curvature, collect_factors
from bmoe_lightning.curvature.layer_sums import LayerSums
from bmoe_lightning.experts import find_expert_layers
from bmoe_lightning.experts.data_record import DataRecorder
from bmoe_lightning.experts.fsdp import shard_blocks
from bmoe_lightning.experts.logits_contract import run_class_logits
from bmoe_lightning.laplace import covariance, slot_terms
from bmoe_lightning.methods import MAP, LaplaceEvidence, evaluate, fit_methods
from bmoe_lightning.methods.evaluation import Predictor
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


BROKEN = "broken on purpose"


def raising(function, calls):
    """The function, which fails in one of its next calls."""
    left = [calls]

    def called(*args, **options):
        left[0] -= 1
        if not left[0]:
            raise ArithmeticError(BROKEN)
        return function(*args, **options)

    return called


def relabelled(value):
    """Batches with other labels in the second one."""
    return [BATCHES[0], {**BATCHES[1], "labels": value(BATCHES[1]["labels"])}, BATCHES[2]]


def mixing(model, batch):
    """A model that mixes the examples of a batch."""
    logits, labels = answer_logits(model, batch)
    return logits + logits.flip(0), labels


def breaking_off():
    yield BATCHES[0]
    raise ArithmeticError(BROKEN)


class Attempts:
    """What is done on all ranks, of which one (`bad`) fails; each is a function, and what the error says."""

    def __init__(self, model, *, bad):
        self.model, self.bad = model, bad
        self.methods = [MAP(), LaplaceEvidence(prior_mean="zero").with_defaults(Curvature(rank=2))]
        self.fit = fit_methods(self.methods, model, answer_logits, BATCHES, None, distributed=True)
        self.posterior = next(iter(self.fit.posteriors.values()))

    def curvature(self, batches=BATCHES, class_logits=answer_logits, **options):
        return lambda: collect_factors(self.model, class_logits, batches, rank=2, distributed=True, **options)

    def cache(self, **options):
        batches = relabelled(lambda labels: labels[1:]) if self.bad else BATCHES
        return lambda: self.posterior.validation_cache(self.model, answer_logits, batches, **options)

    def predict(self):
        for batch in BATCHES:
            self.posterior.predict(self.model, answer_logits, batch)

    def in_two_sweeps(self):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(covariance, "num_sweeps", lambda *_: 2)
            self.predict()

    def evaluate(self, batches):
        return lambda: evaluate(self.methods, self.fit, self.model, answer_logits, batches)

    def patched(self, owner, name, calls, action):
        def attempt():
            with pytest.MonkeyPatch.context() as patch:
                if self.bad:
                    patch.setattr(owner, name, raising(getattr(owner, name), calls))
                action()

        return attempt

    def in_backward(self, block, calls, action):
        """Fails in the backward pass above a block, in one of the next passes."""

        def attempt():
            fail = raising(lambda gradient: gradient, calls)
            hook = lambda _, __, output: output.register_hook(fail) and None  # noqa: E731
            handle = self.model.layers[block].register_forward_hook(hook) if self.bad else None
            try:
                action()
            finally:
                if handle is not None:
                    handle.remove()

        return attempt

    def all(self):
        stream = [breaking_off() if self.bad else iter(BATCHES[:2]) for _ in range(2)]
        mixed = mixing if self.bad else answer_logits
        wrong = relabelled(lambda labels: labels + 70) if self.bad else BATCHES
        predictor = Predictor(self.methods[0], self.fit)
        yield self.curvature(wrong, fisher="empirical"), "labels"
        yield self.curvature(wrong, fisher="empirical", approximation="reduce"), "labels"
        yield self.curvature(class_logits=mixed, approximation="reduce"), "several examples"
        yield self.curvature(stream[0]), BROKEN
        yield self.patched(LayerSums, "add_gradients", 1, self.curvature()), BROKEN
        yield self.patched(LayerSums, "add_gradients", 4, self.curvature()), BROKEN
        yield self.patched(LayerSums, "add_inputs", 1, self.curvature()), BROKEN
        yield self.patched(DataRecorder, "add", 3, self.curvature()), BROKEN
        yield self.patched(LayerSums, "finish", 2, self.curvature()), BROKEN
        yield self.cache(distributed=True), "labels"
        yield self.cache(), "labels"
        yield lambda: self.posterior.predict(self.model, mixed, BATCHES[0]), "several examples"
        yield self.patched(slot_terms, "layer_terms", 1, self.predict), BROKEN
        yield self.patched(slot_terms, "layer_terms", 1, self.in_two_sweeps), BROKEN
        yield self.patched(LaplacePosterior, "covariance_of", 3, self.predict), BROKEN
        yield self.evaluate(wrong), "labels"
        yield self.evaluate(stream[1]), BROKEN
        one = lambda: predictor.predict(self.model, answer_logits, BATCHES[0])  # noqa: E731
        yield self.patched(MAP, "log_probs", 1, one), BROKEN
        for block in (0, 1):
            for calls in (1, 2):
                yield self.in_backward(block, calls, self.curvature()), BROKEN
                yield self.in_backward(block, calls, self.predict), BROKEN


def failing_anywhere(rank, world_size):
    model = sharded(world_size)
    attempts = Attempts(model, bad=rank == 1)
    expected = attempts.curvature()()
    for position, (attempt, said) in enumerate(attempts.all()):
        with pytest.raises(Exception, match=said) as found:
            attempt()
        assert isinstance(found.value, OtherRankError) == (rank != 1), position
        assert gather_number(rank) == list(range(world_size)), position
        assert all(parameter.requires_grad for parameter in model.parameters())
    for mine, other in zip(attempts.curvature()().layers, expected.layers, strict=True):
        assert torch.equal(mine.slots, other.slots)
        torch.testing.assert_close(mine.curvature(), other.curvature())


def some_classes(model, batch):
    logits, labels = answer_logits(model, batch)
    return logits[:, : batch["classes"]], labels.clamp(max=batch["classes"] - 1)


def differing(rank, world_size):
    """Ranks that differ in the sizes of their batches and in the number of classes make equally many passes."""
    sizes, classes = (4, 1, 1, 3), (2, 4, 4, 3)  # those of a rank follow each other
    parts = split(toy_batch(num_rows=9, seed=3), *sizes)
    batches = [{**part, "classes": count} for part, count in zip(parts, classes, strict=True)]
    mine = batches[2 * rank : 2 * rank + 2]
    model, whole = sharded(world_size), toy_model()
    for options in ({"approximation": "expand"}, {"approximation": "reduce"}):
        found = collect_factors(model, some_classes, mine, rank=2, distributed=True, **options)
        expected = collect_factors(whole, some_classes, batches, rank=2, **options)
        for one, other in zip(found.layers, expected.layers, strict=True):
            assert torch.equal(one.slots, other.slots)
            torch.testing.assert_close(one.curvature(), other.curvature(), rtol=1e-3, atol=1e-6)
        for batch in mine:
            probs = [LaplacePosterior(expected).predict(m, some_classes, batch) for m in (model, whole)]
            torch.testing.assert_close(*probs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_all_ranks_raise(world_size, tmp_path):
    run(failing, world_size, tmp_path)


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_all_ranks_raise_wherever_one_fails(world_size, tmp_path):
    run(failing_anywhere, world_size, tmp_path)


def test_ranks_with_other_batches_make_equally_many_passes(tmp_path):
    run(differing, 2, tmp_path)


def test_calls_that_others_do_not_make_are_refused(tmp_path):
    run(calling_more_often, 2, tmp_path)


def test_nothing_is_asked_of_a_model_that_is_not_sharded():
    model = toy_model()
    run_class_logits(answer_logits, model, BATCHES[0])
    assert not model._forward_pre_hooks
