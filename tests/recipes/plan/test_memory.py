"""Bytes against those of a small model that is really trained and fitted."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from oracles.planned import WORK, as_modules, built, class_logits, small_batch, train
from torch.nn.functional import cross_entropy

from bmoe_lightning.curvature import collect_factors
from bmoe_lightning.curvature.spec import CACHE_BYTES, Curvature
from bmoe_lightning.experts import down_proj_parameters, expert_dropout, find_expert_layers
from bmoe_lightning.experts import grouped_matmul as grouped
from bmoe_lightning.laplace import LaplacePosterior, covariance
from bmoe_lightning.laplace.validation_cache import cache_terms
from bmoe_lightning.methods import LaplaceEvidence, save_snapshot
from bmoe_lightning.methods.swag import SnapshotGaussian
from bmoe_lightning.optim import make_adamw, master_weights
from bmoe_lightning.trainer.prior_mean import PriorMean
from bmoe_lightning.utils import devices
from recipes.benchmark.many_classes import ValidationSet
from recipes.common.live_bytes import LiveBytes
from recipes.plan import activations, memory
from recipes.plan.activations import Precision
from recipes.plan.architecture import describe

BFLOAT16 = Precision(2, 2, 2)
WIDE = {"moe_intermediate_size": 640, "num_experts": 4, "num_hidden_layers": 2}
# Dtype of the model, precision, options.
WITHOUT_KERNEL = {
    "float32": (torch.float32, Precision(4, 4, 4), {}),
    "wide float32": (torch.float32, Precision(4, 4, 4), WIDE),
    "float32 second matrices": (torch.bfloat16, Precision(2, 2, 4), {}),
    "odd widths": (torch.bfloat16, BFLOAT16, {"moe_intermediate_size": 50}),
}


@pytest.fixture(params=["narrow", "wide", "dense first"])
def model(request):
    options = {
        "narrow": {},
        "wide": WIDE,
        "dense first": {"mlp_only_layers": [0], "num_key_value_heads": 2},
    }
    return built(torch.bfloat16, **options[request.param])


@pytest.fixture
def fitted(model):
    return collect_factors(model, class_logits, [small_batch()], rank=WORK.rank)


def test_factors_and_posterior_file(model, fitted, tmp_path):
    planned = describe(model)
    held = sum(tensor.nbytes for layer in fitted.layers for tensor in layer.tensors().values())
    assert memory.factor_bytes(planned, WORK.rank) == held
    half = fitted.to(dtype=torch.bfloat16)
    held = sum(tensor.nbytes for layer in half.layers for tensor in layer.tensors().values())
    assert memory.factor_bytes(planned, WORK.rank, torch.bfloat16) == held
    path = tmp_path / "posterior.safetensors"
    LaplacePosterior(fitted).save(path)
    assert memory.posterior_file_bytes(planned, WORK.rank) == pytest.approx(path.stat().st_size, rel=0.01)


def test_a_layer_s_factors_have_the_library_s_shapes(model, fitted):
    for experts, layer in zip(describe(model).experts, fitted.layers, strict=True):
        wanted = memory.layer_factors(experts, WORK.rank).tensors()
        assert {n: (t.shape, t.dtype) for n, t in wanted.items()} == {
            n: (t.shape, t.dtype) for n, t in layer.tensors().items()
        }


def test_sums_of_the_curvature_pass(monkeypatch, model):
    from bmoe_lightning.curvature import layer_sums

    seen, finish = [], layer_sums.LayerSums.finish
    monkeypatch.setattr(layer_sums.LayerSums, "finish", lambda self, scale: seen.append(self) or finish(self, scale))
    collect_factors(model, class_logits, [small_batch()], rank=WORK.rank)
    parts = [part for sums in seen for part in (vars(sums), vars(sums.inputs), vars(sums.gradients))]
    held = sum(value.nbytes for part in parts for value in part.values() if isinstance(value, torch.Tensor))
    assert memory.sketch_bytes(describe(model), WORK.rank) == held


@pytest.mark.parametrize("part", ["down_proj", "experts"])
def test_optimizer(model, part):
    trained = train(model, part)
    weights, tensors = memory.trained_size(describe(model), part)
    assert weights == sum(parameter.numel() for parameter in trained)
    optimizer = torch.optim.AdamW(trained, foreach=True)  # as on a GPU
    cross_entropy(*class_logits(model, small_batch())).backward()
    optimizer.step()
    held = sum(value.nbytes for state in optimizer.state.values() for value in state.values())
    assert memory.optimizer_bytes(weights, tensors, 2) == held
    plan = memory.training_memory(describe(model), WORK, part, torch.bfloat16, checkpointing=False)
    assert plan.optimizer == held
    gradients = sum(parameter.grad.nbytes for parameter in trained)
    assert plan.gradients == gradients
    assert plan.traffic == gradients + 2 * held + 2 * sum(parameter.nbytes for parameter in trained)
    assert plan.weights == sum(parameter.nbytes for parameter in model.parameters())
    with LiveBytes() as live:
        optimizer.step()
    assert plan.step == pytest.approx(live.peak, rel=0.01)


def test_prior_mean(model):
    captured = PriorMean([LaplaceEvidence(curvature=Curvature())])
    captured.capture(model)
    assert memory.prior_mean_bytes(describe(model)) == sum(weight.nbytes for weight in captured.weights.values())


@pytest.mark.parametrize("part", ["down_proj", "experts"])
@pytest.mark.parametrize("split", [False, True])
def test_optimizer_with_a_float32_copy(monkeypatch, model, part, split):
    # As on a GPU.
    monkeypatch.setattr(master_weights, "adamw", partial(master_weights.adamw, foreach=True))
    monkeypatch.setattr(master_weights, "_is_divided", lambda part: False)
    trained = train(model, part)
    planned = describe(model)
    chunk = max(p.numel() for p in trained) if split else sum(p.numel() for p in trained)
    for module in (master_weights, memory):
        monkeypatch.setattr(module, "CHUNK", chunk)
    optimizer = make_adamw(trained, lr=1e-3)
    cross_entropy(*class_logits(model, small_batch())).backward()
    optimizer.step()
    plan = memory.training_memory(planned, WORK, part, torch.bfloat16, checkpointing=False, updates="master_weights")
    held = sum(value.nbytes for state in optimizer.state.values() for value in state.values())
    assert plan.optimizer == held
    written = sum(parameter.nbytes for parameter in trained)
    assert plan.traffic == sum(parameter.grad.nbytes for parameter in trained) + 2 * held + written
    with LiveBytes() as live:
        live.known([*model.parameters(), *(value for state in optimizer.state.values() for value in state.values())])
        optimizer.step()
    assert plan.step == pytest.approx(live.peak, rel=0.01)
    assert plan.weights == sum(parameter.nbytes for parameter in model.parameters())


def test_snapshot(model, tmp_path):
    trained = train(model, "experts")
    save_snapshot(tmp_path / "s", {str(i): parameter for i, parameter in enumerate(trained)})
    plan = memory.training_memory(describe(model), WORK, "experts", torch.bfloat16, checkpointing=False)
    assert plan.gradients == pytest.approx((tmp_path / "s").stat().st_size, rel=0.01)


def saved_for_backward(model, dropout):
    """Bytes of the storages that autograd keeps, weights left out."""
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    layers = find_expert_layers(model)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), expert_dropout(model, layers, dropout):
        loss = cross_entropy(*class_logits(model.train(), small_batch()))
    total = sum(storage.nbytes() for storage in kept.values())
    del loss
    return total


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("part", ["down_proj", "experts"])
def test_activations(model, part, dropout):
    train(model, part)
    planned = sum(activations.saved_bytes(describe(model), WORK, BFLOAT16, part, dropout=dropout > 0))
    assert planned == pytest.approx(saved_for_backward(model, dropout), rel=0.3)


def _as_on_a_gpu(monkeypatch):
    fits = grouped._kernel_fits
    monkeypatch.setattr(grouped, "_kernel_fits", lambda x, other: x.dtype == torch.bfloat16 and fits(x, other))
    monkeypatch.setattr(devices, "answers_at_once", lambda device: False)


@pytest.fixture
def without_kernel(monkeypatch):
    """Products as on a GPU, which has no grouped kernel for float32."""
    _as_on_a_gpu(monkeypatch)


def test_sizes_of_products_without_a_kernel():
    assert activations._BLOCK_ROWS == grouped._BLOCK_ROWS
    assert activations._COPIED_WEIGHTS == grouped._COPIED_FLOATS


@pytest.mark.parametrize("part", ["down_proj", "experts"])
def test_without_a_kernel_inputs_are_kept_and_no_copies_of_matrices(monkeypatch, part):
    model = built(torch.float32)
    train(model, part)
    with_kernel = saved_for_backward(model, 0.1)
    _as_on_a_gpu(monkeypatch)
    without = saved_for_backward(model, 0.1)
    # Of the first matrices, where these are frozen; in the first block nothing below has a gradient.
    inputs = 4 * 3 * WORK.positions * 2 * 64 if part == "down_proj" else 0
    assert without - with_kernel == pytest.approx(inputs, rel=0.1, abs=0.01 * with_kernel)
    planned = activations.saved_bytes(describe(model), WORK, Precision(4, 4, 4), part, dropout=True)
    assert sum(planned) == pytest.approx(without, rel=0.15)


def with_float32_second_matrices(model):
    for layer in find_expert_layers(model):
        for parameter in down_proj_parameters(model, layer).values():
            parameter.data = parameter.data.float()
    return model


class TestPeaks:
    """Estimates of what is alive at once; batches large enough to outweigh the sums of the curvature pass."""

    work = replace(WORK, batch_size=8, tokens=64)

    @pytest.fixture
    def batch(self):
        generator = torch.Generator().manual_seed(1)
        return {"ids": torch.randint(50, (8, 64), generator=generator), "labels": torch.arange(8) % 4}

    def curvature(self, model, batch, fisher, precision, **options):
        """Planned over measured."""
        with LiveBytes() as live:
            live.known(model.parameters())
            collect_factors(model, class_logits, [batch], rank=WORK.rank, fisher=fisher)
        return memory.curvature_transients(describe(model), self.work, precision, **options) / live.peak

    def prediction(self, model, batch, precision, **options):
        posterior = LaplacePosterior(collect_factors(model, class_logits, [batch], rank=WORK.rank))
        with LiveBytes() as live:
            live.known(model.parameters())
            posterior.logit_covariance(model, class_logits, batch, centred=True)
        held = memory.factor_bytes(describe(model), WORK.rank)
        return memory.prediction_transients(describe(model), self.work, precision, **options) / (live.peak + held)

    @pytest.mark.parametrize("fisher", ["mc", "exact"])
    def test_curvature(self, without_kernel, model, batch, fisher):
        assert 0.9 < self.curvature(model, batch, fisher, BFLOAT16) < 1.2

    def test_prediction(self, without_kernel, model, batch):
        assert 0.95 < self.prediction(model, batch, BFLOAT16) < 1.3

    @pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
    # Enough layers to outweigh what is alive in one of them, which is more where experts are wide.
    @pytest.mark.parametrize(
        "options", [{"num_hidden_layers": 16}, {**WIDE, "num_hidden_layers": 6}], ids=["narrow", "wide"]
    )
    def test_gradient_checkpointing(self, without_kernel, batch, options):
        model = built(torch.bfloat16, **options)
        model.gradient_checkpointing_enable()
        ratios = [
            self.curvature(model, batch, "exact", BFLOAT16, checkpointing=True),
            self.prediction(model, batch, BFLOAT16, checkpointing=True),
        ]
        assert min(ratios) > 0.9
        assert max(ratios) < 1.35

    @pytest.mark.parametrize("kind", sorted(WITHOUT_KERNEL))
    def test_without_a_kernel(self, without_kernel, batch, kind):
        dtype, precision, options = WITHOUT_KERNEL[kind]
        model = built(dtype, **options)
        if precision.second != precision.first:
            with_float32_second_matrices(model)
        assert 0.9 < self.curvature(model, batch, "exact", precision) < 1.2
        assert 0.9 < self.prediction(model, batch, precision) < 1.3

    def test_every_expert_a_module(self, without_kernel, batch):
        model = as_modules(built(torch.bfloat16))
        assert {experts.layer.layout for experts in describe(model).experts} == {"modules"}
        assert 0.9 < self.curvature(model, batch, "exact", BFLOAT16) < 1.3
        assert 0.9 < self.prediction(model, batch, BFLOAT16) < 1.3

    @pytest.mark.parametrize("part", ["down_proj", "experts"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_training(self, without_kernel, model, batch, part, dtype):
        model = model.to(dtype)
        train(model, part)
        with expert_dropout(model.train(), find_expert_layers(model), 0.1), LiveBytes() as live:
            live.known(model.parameters())
            cross_entropy(*class_logits(model, batch)).backward()
        plan = memory.training_memory(describe(model), self.work, part, dtype, checkpointing=False)
        assert 0.95 < (plan.activations + plan.gradients) / live.peak < 1.8


def test_lpo_cache(model, fitted):
    batch = small_batch()
    cache = LaplacePosterior(fitted).validation_cache(model, class_logits, [batch, batch])
    held = sum(tensor.nbytes for tensor in vars(cache).values())
    assert memory.lpo_cache_bytes(describe(model), WORK, 2 * WORK.batch_size) == held


def test_lpo_cache_of_many_classes_is_compact():
    model = describe(built(torch.bfloat16))
    many = ValidationSet(30, num_examples=500, num_layers=len(model.experts))
    held = cache_terms(many.batches(), many.curvature()).nbytes
    planned = memory.lpo_cache_bytes(model, replace(WORK, classes=30), 500)
    assert held < planned < 2 * held
    assert memory.lpo_cache_bytes(model, replace(WORK, classes=30), 10**6) < 1.5 * CACHE_BYTES


def plan_of(trained="down_proj", dtype=torch.bfloat16, **options):
    made = describe(built(torch.bfloat16))
    options = {"checkpointing": False, **options}
    return memory.training_memory(made, WORK, trained, dtype, **options)


def test_float32_weights_double_what_is_trained_and_nothing_else():
    half, single = plan_of(), plan_of(dtype=torch.float32)
    assert single.gradients == 2 * half.gradients
    assert single.weights - half.weights == half.gradients
    assert single.activations > half.activations


def test_checkpointing_keeps_less_where_there_are_many_layers():
    assert plan_of(checkpointing=True).activations < plan_of().activations
    assert plan_of(checkpointing=True).curvature < plan_of().curvature


def test_a_prediction_of_many_classes_keeps_the_gradients_of_some_layers(monkeypatch):
    model, many = describe(built(torch.bfloat16)), replace(WORK, classes=30)
    whole = memory.prediction_transients(model, many, BFLOAT16)
    gradients = BFLOAT16.second * sum(many.positions * e.top_k * e.layer.d_out for e in model.experts)
    monkeypatch.setattr(covariance, "GRADIENT_BYTES", 10 * gradients)
    layers = len(model.experts)
    sweeps = min(3, layers)
    expected = 29 * gradients * -(-layers // sweeps) // layers
    assert whole - memory.prediction_transients(model, many, BFLOAT16) == 29 * gradients - expected


def test_what_fits():
    plan = plan_of()
    held = plan.weights + plan.gradients + plan.optimizer
    assert plan.peak == held + max(plan.activations, plan.step, plan.curvature)
    assert plan.fits(plan.peak / 0.95 / 2**30 * 1.001)
    assert not plan.fits(plan.peak / 0.95 / 2**30 * 0.999)


@pytest.mark.parametrize("part", ["down_proj", "experts"])
def test_a_sample_of_the_weights(model, tmp_path, part):
    train(model, part)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    paths = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for path in paths:
        save_snapshot(path, trained)
    samples = SnapshotGaussian(paths, seed=0)
    with LiveBytes() as live:
        size = sum(value.nbytes for value in samples.sample(0).values())
    largest = max(parameter.numel() for parameter in trained.values())
    found = memory.sample_bytes(describe(model), part, len(paths))
    assert found == size + 4 * 6 * largest
    assert live.peak == pytest.approx(found, abs=100)
