"""One short example runs as copies of it: the same covariance from a single backward pass."""

from __future__ import annotations

import pytest
import torch
from oracles.models import (
    answer_logits,
    as_modules,
    choice_batch,
    choices_by_class,
    choices_by_example,
    taken,
    tiny_qwen,
    toy_batch,
    toy_model,
)

from bmoe_lightning.curvature import collect_factors
from bmoe_lightning.experts.counted_batch import CountedBatch
from bmoe_lightning.experts.taps import Taps
from bmoe_lightning.laplace import LaplacePosterior, copied_examples
from bmoe_lightning.laplace.posterior import posterior_terms

DATA = toy_batch(num_rows=12, seed=3)
QUESTION = taken(toy_batch(num_rows=6, seed=5), slice(2, 3))


@pytest.fixture
def passes(monkeypatch):
    """The number of rows of the logits of every backward pass."""
    seen = []
    original = Taps.gradients

    def gradients(self, outputs, *arguments):
        seen.append(len(outputs))
        return original(self, outputs, *arguments)

    monkeypatch.setattr(Taps, "gradients", gradients)
    return seen


def fitted(model, class_logits=answer_logits, data=DATA):
    return LaplacePosterior(collect_factors(model, class_logits, [data], rank=3), 2.0)


def both(posterior, model, batch, class_logits=answer_logits, calls=1):
    """Logits and covariance with copies and without, the copies those of the last of several calls."""
    with copied_examples(64):
        for _ in range(calls):
            found = posterior.logit_covariance(model, class_logits, batch, centred=True)
    return found, posterior.logit_covariance(model, class_logits, batch, centred=True)


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("make", [toy_model, tiny_qwen])
def test_the_covariance_is_that_of_one_pass_for_each_contrast(make, passes):
    model = make()
    posterior = fitted(model)
    del passes[:]
    with copied_examples(64):
        posterior.logit_covariance(model, answer_logits, QUESTION, centred=True)
    assert passes[0] == 3  # which checks the rows
    del passes[:]
    assert_same(*both(posterior, model, QUESTION))
    assert passes[-4:] == [3, 1, 1, 1]  # those before are of the last layer alone


def test_slots_of_unknown_rows_are_not_copied(passes):
    model = as_modules(toy_model())
    assert_same(*both(fitted(model), model, QUESTION))
    assert passes[-6:] == [1] * 6


def test_absent_classes(passes):
    model = toy_model()
    posterior = fitted(model)
    absent = {**QUESTION, "absent": torch.tensor([[True, False, False, False]])}
    found, expected = both(posterior, model, absent, calls=2)
    assert_same(found, expected)
    assert found[0][0, 0] == -torch.inf
    assert passes[-3:] == [3, 1, 1]


def test_attribution_and_several_posteriors(passes):
    model = toy_model(num_layers=3)
    posterior = fitted(model)
    several = [posterior, posterior.without_layers([0]), fitted(model, data=taken(DATA, slice(5)))]

    def parts():
        attribution = posterior.attribute(model, answer_logits, QUESTION)
        terms = posterior_terms(several, model, answer_logits, QUESTION)
        return [layer.variance for layer in attribution.layers], [x.prior for of_one in terms for x in of_one.layers]

    with copied_examples(64):
        found = parts()
    assert 1 < max(passes[-6:]) == 3  # three of the last layer of both predictions, and one of all
    del passes[:]
    for one, other in zip(found, parts(), strict=True):
        assert_same(one, other)


def reversed_rows(model, batch):
    logits, labels = answer_logits(model, {name: value.flip(0) for name, value in batch.items()})
    return logits.flip(0), labels.flip(0)


def mixed_rows(model, batch):
    logits, labels = answer_logits(model, batch)
    return logits + logits.mean(0, keepdim=True), labels


def scaled_rows(model, batch):
    logits, labels = answer_logits(model, batch)
    return logits * len(logits), labels


def biased_rows(model, batch):
    logits, labels = answer_logits(model, batch)
    return logits + batch["mask"][:, -1:].sum(0) * torch.arange(4), labels


def single_rows(model, batch):
    if len(batch["ids"]) > 1 and torch.is_grad_enabled() and len(batch["ids"]) == 3:
        raise TypeError("one at a time")
    return answer_logits(model, batch)


def numbered_rows(model, batch):
    logits, labels = answer_logits(model, batch)
    return logits * (1 + torch.arange(len(logits))).unsqueeze(1), labels


def joined_rows(model, batch):
    logits, labels = answer_logits(model, batch)
    return (logits[:1], labels[:1]) if len(logits) == 3 else (logits, labels)


@pytest.mark.parametrize(
    "class_logits",
    [reversed_rows, mixed_rows, scaled_rows, biased_rows, single_rows, numbered_rows, joined_rows],
)
def test_a_function_that_does_not_treat_copies_alike_gets_none(class_logits, passes):
    model = toy_model()
    posterior = fitted(model)
    found, expected = both(posterior, model, QUESTION, class_logits)
    assert_same(found, expected)
    del passes[:]
    with copied_examples(64):
        posterior.logit_covariance(model, class_logits, QUESTION, centred=True)
    assert passes == [1, 1, 1]  # nor is it tried again


@pytest.mark.parametrize("other", [reversed_rows, mixed_rows, scaled_rows, biased_rows])
def test_another_function_is_checked_too(other):
    model = toy_model()
    posterior = fitted(model)
    assert_same(*both(posterior, model, QUESTION))
    assert_same(*both(posterior, model, QUESTION, other))


def test_layers_of_another_posterior_are_checked_too():
    model = toy_model(num_layers=3)
    posterior = fitted(model)
    lowest = next(module for name, module in model.named_modules() if name.endswith("mixture"))
    lowest.register_forward_hook(lambda _module, _inputs, output: output + 0.5 * output.mean(0, keepdim=True))
    assert_same(*both(posterior.without_layers([0]), model, QUESTION))
    assert_same(*both(posterior, model, QUESTION))


def test_a_batch_without_tensors_is_not_copied():
    def of_texts(model, texts):
        return answer_logits(model, {name: QUESTION[name][: len(texts)] for name in QUESTION})

    model = toy_model()
    assert_same(*both(fitted(model), model, ["a text"], of_texts))


def test_another_number_of_classes_gets_more_copies(passes):
    model = toy_model()
    posterior = fitted(model)

    def some(model, batch):
        logits, labels = answer_logits(model, batch)
        return logits[:, : int(batch["labels"].max()) + 1], labels

    questions = [{**QUESTION, "labels": torch.tensor([last])} for last in (2, 3, 3)]
    for question in questions:
        assert_same(*both(posterior, model, question, some))
    assert passes[-4:] == [3, 1, 1, 1]


@pytest.mark.parametrize("class_logits", [choices_by_example, choices_by_class])
def test_an_example_of_several_rows_is_not_copied(class_logits, passes):
    model = toy_model()
    posterior = fitted(model, class_logits, choice_batch())
    question = taken(choice_batch(seed=4), slice(1))
    assert_same(*both(posterior, model, question, class_logits))
    assert passes[-2:] == [1, 1]


@pytest.mark.parametrize(
    ("batch", "centred"),
    [
        (toy_batch(num_rows=1, length=65), True),
        (taken(DATA, slice(2)), True),
        (CountedBatch(QUESTION, 1, 1), True),
        (QUESTION, False),
    ],
    ids=["long", "two", "counted", "not centred"],
)
def test_other_batches_are_not_copied(batch, centred, passes):
    model = toy_model(max_length=80)
    posterior = fitted(model)
    del passes[:]
    with copied_examples(64):
        posterior.logit_covariance(model, answer_logits, batch, centred=centred)
    assert set(passes[-3:]) <= {1, 2}


def test_two_classes_take_one_pass_anyway(passes):
    def two(model, batch):
        logits, labels = answer_logits(model, batch)
        return logits[:, :2], labels % 2

    model = toy_model()
    posterior = fitted(model, two)
    del passes[:]
    with copied_examples(64):
        posterior.logit_covariance(model, two, QUESTION, centred=True)
    assert passes == [1]


def test_other_routes_of_a_copy_are_noticed(passes):
    model = toy_model()
    posterior = fitted(model)
    router = next(module for name, module in model.named_modules() if name.endswith("router"))

    def of_rows(_module, _inputs, output):
        moved = output.view(-1, QUESTION["ids"].shape[1], output.shape[-1]).clone()
        if len(moved) == 3:
            moved[2] = moved[2].roll(1, -1)
        return moved.view(output.shape)

    router.register_forward_hook(of_rows)
    assert_same(*both(posterior, model, QUESTION))
    assert passes[-6:] == [1] * 6


def test_a_lack_of_memory_for_copies_is_no_error(caplog, passes):
    def scarce(model, batch):
        if len(batch["ids"]) == 3 and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("XPU out of memory. Tried to allocate 2.00 GiB")
        return answer_logits(model, batch)

    model = toy_model()
    assert_same(*both(fitted(model), model, QUESTION, scarce, calls=2))
    assert [record.message for record in caplog.records if "not copied" in record.message] == [
        "examples are not copied, and take one backward pass for each contrast: XPU out of memory. Tried to allocate "
        "2.00 GiB"
    ]
    assert passes[-9:] == [1] * 9


def test_nothing_is_copied_unless_asked_for(passes):
    model = toy_model()
    posterior = fitted(model)
    del passes[:]
    with copied_examples(QUESTION["ids"].numel() - 1):
        posterior.logit_covariance(model, answer_logits, QUESTION, centred=True)
    posterior.logit_covariance(model, answer_logits, QUESTION, centred=True)
    assert passes == [1] * 6
    for wrong in (-1, 1.5, True, None):
        with pytest.raises(ValueError, match=f"an integer of at least 0, got {wrong}"), copied_examples(wrong):
            pass
