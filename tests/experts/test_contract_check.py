"""The check of `class_logits` on one batch: what it says, and that it leaves everything as it was."""

from __future__ import annotations

import warnings

import pytest
import torch
from oracles.models import answer_logits, toy_batch, toy_model

from bmoe_lightning.experts import find_expert_layers
from bmoe_lightning.experts.contract_check import check_class_logits


@pytest.fixture
def model():
    model = toy_model()
    model.train()
    next(iter(model.children())).eval()
    return model


def checked(model, class_logits=answer_logits, *, taps=True, batch=None, **options):
    layers = find_expert_layers(model) if taps else ()
    logits = check_class_logits(model, class_logits, toy_batch() if batch is None else batch, layers=layers, **options)
    assert not logits.requires_grad
    return len(logits)


def returning(change):
    """A `class_logits` whose logits and labels are changed."""
    return lambda model, batch: change(*answer_logits(model, batch))


@pytest.mark.parametrize("taps", [False, True])
class TestAnyCheck:
    def test_returns_the_logits_and_changes_nothing(self, model, taps):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        modes = [module.training for module in model.modules()]
        flags = [p.requires_grad for p in model.parameters()]
        state, calls, batch = torch.get_rng_state(), [], toy_batch()
        values = {name: value.clone() for name, value in batch.items()}

        def noisy(model, batch):
            calls.append(any(module.training for module in model.modules()))
            torch.rand(3)
            return answer_logits(model, batch)

        assert checked(model, noisy, taps=taps, batch=batch) == 5
        assert calls == [False]  # once, in evaluation mode
        assert torch.equal(torch.get_rng_state(), state)
        assert [module.training for module in model.modules()] == modes
        assert [p.requires_grad for p in model.parameters()] == flags
        assert all(p.grad is None for p in model.parameters())
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert all(torch.equal(value, values[name]) for name, value in batch.items())

    def test_training_mode_that_is_left_behind(self, model, taps):
        def trains(model, batch):
            found = answer_logits(model, batch)
            model.layers.train()
            return found

        def trains_meanwhile(model, batch):
            model.train()
            found = answer_logits(model, batch)
            model.eval()
            return found

        modes = [module.training for module in model.modules()]
        with pytest.raises(RuntimeError, match=r"class_logits leaves layers in training mode.*do not call train\(\)"):
            checked(model, trains, taps=taps)
        assert [module.training for module in model.modules()] == modes
        checked(model, trains_meanwhile, taps=taps)

    def test_changes_nothing_either_where_it_fails(self, model, taps):
        modes = [module.training for module in model.modules()]
        state = torch.get_rng_state()
        with pytest.raises(ValueError, match="NaN"):
            checked(model, returning(lambda f, y: (f * torch.nan, y)), taps=taps)
        assert [module.training for module in model.modules()] == modes
        assert torch.equal(torch.get_rng_state(), state)
        assert all(p.requires_grad for p in model.parameters())

    @pytest.mark.parametrize(
        ("change", "error", "said"),
        [
            (lambda f, y: f, TypeError, r"must return \(logits, labels or None\)"),
            (lambda f, y: (f[:, 0], y), ValueError, r"shape \[B, K\] with K >= 2"),
            (lambda f, y: (f.softmax(-1), y), ValueError, "returned probabilities"),
            (lambda f, y: (f, y + 1), ValueError, "counted from 1|label"),
            (lambda f, y: (f, y.tolist()), ValueError, "labels as a list"),
            (lambda f, y: (f, y[1:]), ValueError, r"labels \(4,\)"),
        ],
    )
    def test_what_is_wrong_is_one_sentence(self, model, taps, change, error, said):
        with pytest.raises((error, ValueError), match=said):
            checked(model, returning(change), taps=taps)

    def test_labels_are_checked_as_far_as_they_are_used(self, model, taps):
        placeholders = returning(lambda f, y: (f, torch.full_like(y, -100)))
        assert checked(model, placeholders, taps=taps, labelled=False) == 5
        for options in ({}, {"labelled": False, "needing_labels": ["temperature"]}):
            with pytest.raises(ValueError, match="-100"):
                checked(model, placeholders, taps=taps, **options)
        unlabelled = returning(lambda f, y: (f, None))
        assert checked(model, unlabelled, taps=taps) == 5
        with pytest.raises(ValueError, match=r"one, two need labels, but .* returned None .*return \(logits, labels\)"):
            checked(model, unlabelled, taps=taps, needing_labels=["one", "two"])

    def test_a_label_of_an_absent_class(self, model, taps):
        def absent(logits, labels):
            return logits.scatter(1, labels.unsqueeze(1), -torch.inf), labels

        with pytest.raises(ValueError, match="5 labels name a class that their example does not have"):
            checked(model, returning(absent), taps=taps)

    @pytest.mark.parametrize(("value", "warned"), [(-100.0, True), (-1e9, False), (-torch.inf, False)])
    def test_a_value_that_looks_like_a_mask(self, model, taps, value, warned):
        def masked(logits, labels):
            hidden = torch.zeros_like(logits, dtype=torch.bool)
            hidden[:3, 0] = True
            return logits.masked_fill(hidden, value), labels.clamp(min=1)

        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert checked(model, returning(masked), taps=taps) == 5
        found = [str(warning.message) for warning in said if "marks absent classes, use -inf" in str(warning.message)]
        assert len(found) == warned
        assert all("-100 in several rows" in sentence for sentence in found)

    def test_a_write_to_the_batch(self, model, taps):
        def writes(model, batch):
            batch["ids"].clamp_(max=3)
            return answer_logits(model, batch)

        with pytest.raises(RuntimeError, match=r"class_logits writes in place to batch\['ids'\]"):
            checked(model, writes, taps=taps)


class TestGradients:
    def test_are_asked_for_with_layers_only(self, model):
        detached = returning(lambda f, y: (f.detach(), y))
        assert checked(model, detached, taps=False) == 5
        with pytest.raises(RuntimeError, match="logits without a graph"):
            checked(model, detached)

    @pytest.mark.parametrize("rows", [4, 5])
    def test_logits_that_depend_on_other_examples(self, model, rows):
        centred = returning(lambda f, y: (f - f.mean(0), y))
        assert checked(model, centred, taps=False, batch=toy_batch(rows)) == rows
        with pytest.raises(RuntimeError, match="moves the logits of several examples"):
            checked(model, centred, batch=toy_batch(rows))

    def test_another_model_than_the_one_that_is_given(self, model):
        other = toy_model(seed=3)
        with pytest.raises(RuntimeError, match=r"logits without a graph|no token was routed"):
            checked(model, lambda _, batch: answer_logits(other, batch))

    @pytest.mark.parametrize("taps", [False, True])
    def test_store_activations_only_with_layers(self, model, taps):
        graphs = []

        def watched(model, batch):
            graphs.append(torch.is_grad_enabled())
            return answer_logits(model, batch)

        checked(model, watched, taps=taps)
        assert graphs == [taps]
