"""The share of the trained weights' gradient that a posterior covers, against gradients that are written out."""

from __future__ import annotations

import json
import math
import weakref
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from forked_processes import run
from oracles.models import answer_logits, split, taken, tiny_qwen, toy_batch, toy_model
from oracles.training import train_only

from bmoe_lightning.curvature import collect_factors, pass_sums
from bmoe_lightning.curvature.gradient_share import (
    MAX_PASSES,
    GradientShare,
    GradientShareRecorder,
    random_contrasts,
    share_of_squares,
)
from bmoe_lightning.experts import find_expert_layers
from bmoe_lightning.experts.counted_batch import CountedBatch
from bmoe_lightning.experts.tapped_batches import tapped_batch
from bmoe_lightning.experts.weight_gradients import squared_gradients

MODULE = "bmoe_lightning.curvature.gradient_share"
DOWN = "down_proj"


def batches(count=30, rows=2):
    return split(toy_batch(num_rows=count * rows, seed=3), *[rows] * count)


def estimated(model, data, seed=0, class_logits=answer_logits, **options):
    layers = find_expert_layers(model)
    recorder = GradientShareRecorder(model, layers, seed=seed)
    factors = collect_factors(model, class_logits, data, rank=3, share=recorder, **options)
    return recorder.finish().of([layer.name for layer in layers]), factors


def written_out(model, data, parts=(DOWN,)):
    """The share, from the gradient of every centred logit of every example."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    totals = [0.0, 0.0]
    for batch in data:
        logits, _ = answer_logits(model, batch)
        for value in (logits - logits.mean(1, keepdim=True)).flatten():
            gradients = torch.autograd.grad(value, list(trained.values()), retain_graph=True, materialize_grads=True)
            for name, gradient in zip(trained, gradients, strict=True):
                square = float(gradient.double().square().sum())
                totals[0] += square
                totals[1] += square * any(part in name for part in parts)
    return totals[1] / totals[0]


class TestShare:
    @pytest.mark.parametrize("trained", [("",), (DOWN, "gate_up_proj"), (DOWN, "head")])
    def test_is_that_of_written_out_gradients(self, monkeypatch, trained):
        # An orthonormal basis of the contrasts of four classes in place of random ones, one example at a time, so that
        # the mean over them is exact.
        basis = torch.linalg.svd(torch.eye(4).double() - 0.25)[0].T[:3]
        turns = iter(range(100))
        monkeypatch.setattr(f"{MODULE}._COST", 10.0)  # every batch
        monkeypatch.setattr(f"{MODULE}.random_contrasts", lambda *_, **__: basis[next(turns) % 3].view(1, 4))
        model, data = train_only(toy_model(), *trained), batches(4, 1)
        found, _ = estimated(model, [batch for batch in data for _ in range(3)])
        assert found.num_passes == 12
        assert found.share == pytest.approx(written_out(model, data), rel=1e-10)
        assert found.kappa == 1 / found.share

    def test_of_random_contrasts(self):
        model, data = toy_model(), batches()
        found, _ = estimated(model, data)
        assert found.share == pytest.approx(written_out(model, data[::3]), abs=4 * found.standard_error)

    def test_standard_error_is_the_spread_over_samples(self):
        generator = torch.Generator().manual_seed(0)
        covered, rest = torch.empty(2, 500, 30, dtype=torch.float64).exponential_(generator=generator)
        found = [share_of_squares(squares) for squares in torch.stack([covered + 3 * rest, covered], dim=2)]
        shares = torch.tensor([share.share for share in found])
        stated = torch.tensor([share.standard_error for share in found])
        assert float(shares.mean()) == pytest.approx(0.25, rel=0.05)
        assert float(stated.mean()) == pytest.approx(float(shares.std()), rel=0.1)
        errors = torch.tensor([share.kappa_error for share in found])
        assert float(errors.mean()) == pytest.approx(float((1 / shares).std()), rel=0.2)

    def test_is_known_where_exactly_the_covered_weights_are_trained(self):
        found, _ = estimated(train_only(toy_model(), DOWN), batches(2))
        assert found == GradientShare(1.0, 0.0, num_trained=found.num_trained, is_assumed=True)
        assert (found.kappa, found.kappa_error) == (1, 0)

    def test_weights_that_no_optimizer_has_are_not_trained(self):
        model, layers = toy_model(), find_expert_layers(toy_model())
        trained = [p for name, p in model.named_parameters() if DOWN in name]
        recorder = GradientShareRecorder(model, layers, trained=trained)
        expected = GradientShare(1.0, 0.0, num_trained=sum(p.numel() for p in trained))
        assert recorder.finish().of([layer.name for layer in layers]) == expected

    def test_of_some_of_the_layers(self):
        model, data = toy_model(), batches(8)
        first, second = find_expert_layers(model)
        recorder = GradientShareRecorder(model, [first, second])
        collect_factors(model, answer_logits, data, rank=3, share=recorder)
        shares = recorder.finish()
        parts = [shares.of([layer.name]) for layer in (first, second)]
        assert sum(part.share for part in parts) == pytest.approx(shares.of([first.name, second.name]).share)
        alone = GradientShareRecorder(model, [second])
        collect_factors(model, answer_logits, data, rank=3, layers=[second], share=alone)
        assert alone.finish().of([second.name]).share == pytest.approx(parts[1].share, rel=1e-12)

    def test_of_some_of_the_layers_is_estimated_only_where_it_is_needed(self):
        model, data = train_only(toy_model(), DOWN), batches(8)
        layers = find_expert_layers(model)
        names = [layer.name for layer in layers]
        whole, part = (
            GradientShareRecorder(model, layers, choices=choices) for choices in ([names], [names, names[:1]])
        )
        for recorder in (whole, part):
            collect_factors(model, answer_logits, data, rank=3, share=recorder)
            assert recorder.finish().of(names).share == 1
        assert len(whole.finish().squares) == 0
        assert 0 < part.finish().of(names[:1]).share < 1

    def test_is_nothing_where_no_covered_weight_is_trained(self):
        found, _ = estimated(train_only(toy_model(), "head"), batches(2))
        assert (found.share, found.kappa, found.kappa_error) == (0, math.inf, None)

    def test_is_unknown_where_nothing_is_trained(self):
        found, _ = estimated(train_only(toy_model()), batches(2))
        assert (found.share, found.kappa, found.reason) == (None, None, "no weight requires gradients")

    def test_of_bfloat16_weights(self):
        wide, narrow = toy_model(), toy_model().bfloat16()
        expected, _ = estimated(wide, batches())
        found, _ = estimated(narrow, batches())
        assert found.share == pytest.approx(expected.share, rel=0.05)

    def test_is_unknown_in_float16(self):
        found, _ = estimated(toy_model().half(), batches(2))
        assert found.share is None
        assert "float16" in found.reason

    def test_is_unknown_if_a_gradient_is_not_finite(self):
        found = share_of_squares(torch.tensor([[1.0, 0.5], [math.inf, 1.0]], dtype=torch.float64))
        assert (found.share, found.reason) == (None, "a gradient is not finite")

    def test_of_one_pass_has_no_standard_error(self):
        found = share_of_squares(torch.tensor([[4.0, 1.0]], dtype=torch.float64))
        assert (found.share, found.standard_error, found.kappa_error) == (0.25, None, None)

    def test_of_gradient_checkpointing(self):
        model = tiny_qwen(dtype=torch.float32)
        expected, _ = estimated(model, batches(2))
        model.gradient_checkpointing_enable()
        found, _ = estimated(model, batches(2))
        assert found.share == pytest.approx(expected.share, rel=1e-5)


PLACES = ("forward", "ownership", "curvature", "backward")


class TestPass:
    @pytest.mark.parametrize("fisher", ["exact", "mc"])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_changes_no_bit_of_the_factors(self, fisher, dtype):
        model = tiny_qwen(dtype=dtype)
        expected = collect_factors(model, answer_logits, batches(6), rank=3, fisher=fisher)
        state = torch.random.get_rng_state()
        _, found = estimated(model, batches(6), fisher=fisher)
        assert torch.equal(torch.random.get_rng_state(), state)
        for one, other in zip(found.layers, expected.layers, strict=True):
            assert all(torch.equal(value, other.tensors()[name]) for name, value in one.tensors().items())

    @pytest.mark.parametrize(
        ("place", "error"),
        [
            *((place, torch.OutOfMemoryError("XPU out of memory")) for place in PLACES),
            ("backward", RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")),
        ],
    )
    @pytest.mark.parametrize("at", [0, 2])
    def test_is_unknown_without_enough_memory_and_the_factors_are_the_same(self, monkeypatch, place, error, at):
        """Memory runs out wherever a part of the pass runs while the graph reaches the weights."""
        model, calls = toy_model(), []
        options = {"rank": 3, "fisher": "mc", "approximation": "reduce"}
        expected = collect_factors(model, answer_logits, batches(6), **options)

        def class_logits(model, batch):
            calls.append(batch)
            return answer_logits(model, batch)

        def refused(function):
            turns = iter(range(100))

            def refusing(*args, **given):
                if any(p.requires_grad for p in model.parameters()) and next(turns) == at:
                    raise error
                return function(*args, **given)

            return refusing

        if place == "forward":
            class_logits = refused(class_logits)
        elif place == "backward":
            monkeypatch.setattr(f"{MODULE}.squared_gradients", refused(squared_gradients))
        else:
            name = {"ownership": "slot_owners", "curvature": "_add_batch"}[place]
            module = "bmoe_lightning.curvature.pass_sums"
            monkeypatch.setattr(f"{module}.{name}", refused(getattr(pass_sums, name)))
        layers = find_expert_layers(model)
        recorder = GradientShareRecorder(model, layers)
        found = collect_factors(model, class_logits, batches(6), **options, share=recorder)
        share = recorder.finish().of([layer.name for layer in layers])
        if place in ("forward", "backward"):
            assert share.reason.startswith("there is not enough memory")
            assert len(calls) == 6 + at + (place == "backward")
        else:  # these parts run on frozen weights alone
            assert share.num_passes == 4
        assert all(p.requires_grad and p._backward_hooks is None for p in model.parameters())
        for one, other in zip(found.layers, expected.layers, strict=True):
            assert all(torch.equal(value, other.tensors()[name]) for name, value in one.tensors().items())

    def test_raises_any_other_error(self, monkeypatch):
        def broken(*_):
            raise RuntimeError("mat1 and mat2 have other shapes")

        monkeypatch.setattr(f"{MODULE}.squared_gradients", broken)
        with pytest.raises(RuntimeError, match="other shapes"):
            estimated(toy_model(), batches(2))

    def test_runs_no_hook_of_a_parameter(self):
        model, seen = toy_model(), []
        expected, _ = estimated(model, batches(3))
        handle = model.head.weight.register_hook(lambda gradient: seen.append(1) or 1000 * gradient)
        found, _ = estimated(model, batches(3))
        assert (found, seen) == (expected, [])
        model.head.weight.sum().backward()
        assert seen == [1]
        assert bool((model.head.weight.grad == 1000).all())
        handle.remove()
        model.head.weight.sum().backward()
        assert seen == [1]

    def test_frees_the_graph_of_one_before_the_other(self):
        model, alive = toy_model(), []

        def class_logits(model, batch):
            assert all(graph() is None for graph in alive)
            logits, labels = answer_logits(model, batch)
            alive.append(weakref.ref(logits))
            return logits, labels

        estimated(model, batches(5), class_logits=class_logits)
        assert len(alive) == 9

    def test_leaves_the_noise_of_a_random_model_alone(self):
        def class_logits(model, batch):
            logits, labels = answer_logits(model, batch)
            return logits + torch.randn(logits.shape).double(), labels

        model = toy_model()
        torch.manual_seed(0)
        expected = collect_factors(model, class_logits, batches(5), rank=3)
        torch.manual_seed(0)
        _, found = estimated(model, batches(5), class_logits=class_logits)
        for one, other in zip(found.layers, expected.layers, strict=True):
            assert torch.equal(one.g_eigenvalues, other.g_eigenvalues)

    def test_leaves_the_model_as_it_was(self):
        model = train_only(toy_model(), DOWN, "head").train()
        model.head.weight.grad = torch.ones_like(model.head.weight)
        flags = {name: p.requires_grad for name, p in model.named_parameters()}
        estimated(model, batches(5))
        assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
        assert all(module.training for module in model.modules())
        assert torch.equal(model.head.weight.grad, torch.ones_like(model.head.weight))
        assert all(p.grad is None for p in model.parameters() if p is not model.head.weight)
        assert all(p._backward_hooks is None for p in model.parameters())

    @pytest.mark.parametrize("num_passes", [1, 3, 9])
    @pytest.mark.parametrize("count", [3, 60, 200, 10_000])
    def test_takes_a_small_part_of_the_curvature_pass_beside_the_first_batches(self, monkeypatch, count, num_passes):
        model = toy_model(num_layers=1)
        passes, number = [], len(list(model.parameters()))
        monkeypatch.setattr(f"{MODULE}.random_contrasts", lambda *_, **__: None)
        monkeypatch.setattr(f"{MODULE}.squared_gradients", lambda *_: passes.append(1) or torch.ones(number).double())
        recorder = GradientShareRecorder(model, find_expert_layers(model))
        tapped = SimpleNamespace(taps=SimpleNamespace(scale=None), logits=None)
        monkeypatch.setattr(f"{MODULE}.tapped_batch", lambda *_, **__: nullcontext(tapped))
        for _ in range(count):
            recorder.add(model, (), answer_logits, None, num_passes)
        cost_of_pass = count * (1 + num_passes)  # a forward and K - 1 backward passes, or 1
        assert len(recorder.finish().squares) == len(passes) <= MAX_PASSES
        assert 3 * len(passes) <= 0.07 * cost_of_pass + 12
        assert len(passes) >= min(3, count)

    def test_a_resumed_pass_gives_the_same_number(self, tmp_path):
        model, data = toy_model(), batches(30)
        expected, _ = estimated(model, data)

        def stopping():
            yield from data[:17]
            raise KeyboardInterrupt

        options = {"checkpoint": tmp_path / "sums.safetensors", "checkpoint_every": 4}
        with pytest.raises(KeyboardInterrupt):
            estimated(model, stopping(), **options)
        found, _ = estimated(model, data, **options)
        assert found == expected

    def test_a_checkpoint_of_an_earlier_version_is_resumed(self):
        recorder = GradientShareRecorder(toy_model(), find_expert_layers(toy_model()))
        recorder.load_state({})
        state = recorder.state()
        for wrong in ({"squares": state["squares"]}, {**state, "squares": torch.zeros(1, 2).double()}):
            with pytest.raises(ValueError, match="squared gradients"):
                recorder.load_state(wrong)


class TestContrasts:
    def test_have_mean_zero_over_the_classes_of_an_example(self):
        model, batch = toy_model(), toy_batch(num_rows=4)
        absent = torch.zeros(4, 4, dtype=torch.bool)
        absent[1, 2] = True
        with tapped_batch(
            model, find_expert_layers(model), answer_logits, CountedBatch({**batch, "absent": absent}, 3, 4)
        ) as tapped:
            found = random_contrasts(tapped, seed=0)
            assert torch.equal(found, random_contrasts(tapped, seed=0))
            assert not torch.equal(found, random_contrasts(tapped, seed=1))
        torch.testing.assert_close(found.sum(1), torch.zeros(4).double())
        assert found[1, 2] == 0
        assert bool((found[3] == 0).all())  # of padding
        assert int((found != 0).sum()) == 4 + 3 + 4


def _of_rank(folder, rank, ranks):
    model, batch = toy_model(), toy_batch(num_rows=12, seed=3)
    data = [taken(batch, slice(begin + rank, begin + 4, ranks)) for begin in (0, 4, 8)]
    recorder = GradientShareRecorder(model, find_expert_layers(model), distributed=True)
    collect_factors(model, answer_logits, data, rank=3, distributed=True, share=recorder)
    squares = recorder.state()["squares"]
    share = recorder.finish().of([find_expert_layers(model)[1].name])
    (folder / f"{rank}.json").write_text(json.dumps([share.share, share.standard_error, share.num_passes]))
    torch.save(squares, folder / f"{rank}.pt")


def test_all_ranks_have_the_share_of_all_passes(tmp_path):
    run(partial(_of_rank, tmp_path), 2, tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    squares = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert not torch.equal(*squares)
    expected = share_of_squares(torch.cat(squares)[:, [0, 2]])
    assert first[2] == 6
    assert first[0] == pytest.approx(expected.share)
    assert first[1] == pytest.approx(expected.standard_error)
