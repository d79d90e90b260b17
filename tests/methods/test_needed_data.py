"""Too few held-out inputs, or none with labels, are told before the first pass, for every registered method."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from forked_processes import run
from methods_cases import RANK3
from oracles.models import answer_logits, choice_batch, choices_by_example, split, toy_batch, toy_model

from bmoe_lightning.methods import MAP, EvidenceTemperature, LaplaceEvidence, TemperatureScaling, fit_methods
from bmoe_lightning.methods.data_differences import DataMismatchError
from bmoe_lightning.methods.needs import NeedsError
from bmoe_lightning.methods.registry import get_method, method_names

METHODS = [
    replace(method, **{"head": "head"} if hasattr(method, "head") else {}).with_defaults(RANK3)
    for method in map(get_method, method_names())
    # Another kind of model, and one whose routers return their choice.
    if not method.needs.lora and method.name != "temperature_router"
]
WITH_INPUTS = [method for method in METHODS if method.needs.calibration]
WITH_LABELS = [method for method in METHODS if method.needs.calibration_labels]
WITH_MANY = [method for method in METHODS if method.needs.calibration_inputs > 1]
TRAINING = split(toy_batch(num_rows=16, seed=3), 8, 8)
MODEL = toy_model(num_layers=1)
MOVED = {name: p.detach() + 0.1 for name, p in MODEL.named_parameters()}


def held_out(count, size=40, **changed):
    batch = {**toy_batch(num_rows=count, seed=4), **changed}
    sizes = [min(size, count - start) for start in range(0, count, size)]
    return split({name: value for name, value in batch.items() if value is not None}, *sizes)


def by_name(methods):
    return pytest.mark.parametrize("method", methods, ids=lambda method: method.name)


class Forward:
    """`answer_logits` for plain forward passes alone."""

    def __init__(self):
        self.examples = 0

    def __call__(self, model, batch):
        assert not torch.is_grad_enabled(), "a pass with gradients has begun"
        self.examples += len(batch["ids"])
        return answer_logits(model, batch)


class Untouchable:
    def __iter__(self):
        raise AssertionError("the pass over the training data has begun")


@pytest.fixture(scope="module")
def earlier():
    """A fit with the curvature of all methods."""
    return fit([LaplaceEvidence(curvature=RANK3)], None, answer_logits, training=TRAINING)


def fit(methods, calibration, class_logits=None, training=None, **options):
    return fit_methods(
        methods, MODEL, class_logits or Forward(), training or Untouchable(), calibration, prior_mean=MOVED, **options
    )


class TestWithoutAFit:
    @by_name(WITH_INPUTS)
    def test_no_inputs(self, method):
        with pytest.raises(NeedsError, match="the calibration split is empty"):
            fit([MAP(), method], [])

    @by_name(WITH_MANY)
    @pytest.mark.parametrize("size", [1, 40, 99, 200])
    def test_one_input_too_few(self, method, size):
        needed, forward = method.needs.calibration_inputs, Forward()
        with pytest.raises(NeedsError, match=f"{method.name} needs at least {needed} .* there are {needed - 1}; add"):
            fit([method], held_out(needed - 1, size), forward)
        assert forward.examples <= 3 * needed

    @by_name(WITH_LABELS)
    def test_no_labels(self, method):
        with pytest.raises(NeedsError, match=f"{method.name} are fitted on held-out labels, and 40 of the first 40"):
            fit([method], held_out(120, labels=None))

    @by_name(WITH_LABELS)
    def test_a_label_of_no_class(self, method):
        with pytest.raises(ValueError, match="label"):
            fit([method], held_out(120, labels=torch.full((120,), 4)))


class TestOfAFitThatIsCompleted:
    @by_name(WITH_INPUTS)
    def test_no_inputs(self, method, earlier):
        with pytest.raises(NeedsError, match="the calibration split is empty"):
            fit([method], [], earlier=earlier, training=TRAINING)

    @by_name(WITH_MANY)
    def test_one_input_too_few(self, method, earlier):
        needed = method.needs.calibration_inputs
        with pytest.raises(NeedsError, match=f"at least {needed} .* there are {needed - 1}; add"):
            fit([method], held_out(needed - 1), earlier=earlier, training=TRAINING)

    @by_name(WITH_LABELS)
    def test_no_labels(self, method, earlier):
        with pytest.raises(NeedsError, match="are fitted on held-out labels"):
            fit([method], held_out(120, labels=None), earlier=earlier, training=TRAINING)

    def test_what_the_fit_knows_needs_no_pass_at_all(self, earlier):
        few = fit([TemperatureScaling()], held_out(60), earlier=earlier, training=TRAINING)
        methods = [TemperatureScaling(), EvidenceTemperature(curvature=RANK3)]
        with pytest.raises(NeedsError, match=r"at least 100 .* there are 60; add"):
            fit(methods, held_out(60), earlier=few, training=TRAINING)
        with pytest.raises(DataMismatchError, match=r"held-out data are not .*: 100 or more examples instead of 60"):
            fit(methods, held_out(120), earlier=few, training=TRAINING)
        bare = fit([EvidenceTemperature(curvature=RANK3)], held_out(120, labels=None), answer_logits, TRAINING)
        assert bare.calibration[1] is None
        with pytest.raises(NeedsError, match="are fitted on held-out labels, and 120 of the first 120"):
            fit([TemperatureScaling()], None, earlier=bare, training=TRAINING)


def test_enough_examples_in_batches_that_grow_and_of_several_rows_each(earlier):
    """The number of examples is counted, not estimated from that of rows or batches."""
    enough = held_out(1) + held_out(3) + held_out(96)
    assert fit([EvidenceTemperature(curvature=RANK3)], enough, answer_logits, TRAINING).calibration[0].shape[0] == 100
    with pytest.raises(NeedsError, match="there are 99"):
        fit([EvidenceTemperature(curvature=RANK3)], held_out(1) + held_out(98))

    def class_logits(model, batch):
        return choices_by_example(model, {**batch, **{name: batch[name].view(-1, 3, 6) for name in ("ids", "mask")}})

    choices = [choice_batch(num_examples=count) for count in (25, 24)]
    choices = [{**batch, "ids": batch["ids"].flatten(0, 1), "mask": batch["mask"].flatten(0, 1)} for batch in choices]
    with pytest.raises(NeedsError, match="there are 49"):
        fit([EvidenceTemperature(curvature=RANK3, min_inputs=50)], choices, class_logits)


def test_data_that_can_be_iterated_over_once_are_left_for_the_pass():
    found = fit([TemperatureScaling()], iter(held_out(60)), answer_logits)
    assert len(found.calibration[1]) == 60


def on_two_ranks(rank, world_size):
    parts = [held_out(100)[0]] * 2
    mine = split({name: value[rank::2] for name, value in parts[0].items()}, 5, 5, 10)
    options = {"training": TRAINING, "distributed": True}
    for needed, refused in ((40, False), (41, True)):
        method = EvidenceTemperature(curvature=RANK3, min_inputs=needed)
        if refused:
            with pytest.raises(NeedsError, match=r"at least 41 .* there are 40"):
                fit([method], mine, **options)
        else:
            assert len(fit([method], mine, answer_logits, **options).calibration[0]) == 40
    bare = [{name: value for name, value in batch.items() if rank or name != "labels"} for batch in mine]
    with pytest.raises(NeedsError, match="held-out labels, and 5 of the first 10 examples have none"):
        fit([TemperatureScaling()], bare, **options)


def test_the_inputs_of_all_ranks_count(tmp_path):
    run(on_two_ranks, 2, tmp_path)


@pytest.mark.parametrize("size", [16, 100, 120])
def test_one_batch_is_enough_where_the_loader_has_a_length(size):
    data, forward = held_out(120, size), Forward()
    with pytest.raises(AssertionError, match="the pass over the training data has begun"):
        fit([EvidenceTemperature(curvature=RANK3)], data, forward)
    assert forward.examples == size
