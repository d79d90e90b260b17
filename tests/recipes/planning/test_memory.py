"""Bytes against those of a small model that is really trained and fitted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from planned import WORK, LiveBytes, built, class_logits, small_batch, train
from torch.nn.functional import cross_entropy

from bmoe_lightning.baselines import save_snapshot
from bmoe_lightning.curvature import collect_factors
from bmoe_lightning.experts import expert_dropout, find_expert_layers, grouped
from bmoe_lightning.laplace import LaplacePosterior
from recipes.planning import memory
from recipes.planning.architecture import describe
from recipes.planning.memory import Precision

BFLOAT16 = Precision(2, 2, 2)


@pytest.fixture(params=["narrow", "wide", "dense first"])
def model(request):
    options = {
        "narrow": {},
        "wide": {"moe_intermediate_size": 640, "num_experts": 4, "num_hidden_layers": 2},
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
    from bmoe_lightning.curvature import kfac

    seen, finish = [], kfac._LayerSums.finish
    monkeypatch.setattr(kfac._LayerSums, "finish", lambda self, scale: seen.append(self) or finish(self, scale))
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
    plan = memory.training_memory(describe(model), WORK, part, torch.bfloat16, fisher="mc", checkpointing=False)
    assert plan.optimizer == held
    assert plan.gradients == sum(parameter.grad.nbytes for parameter in trained)
    assert plan.weights == sum(parameter.nbytes for parameter in model.parameters())
    with LiveBytes() as live:
        optimizer.step()
    assert plan.step == pytest.approx(live.peak, rel=0.01)


def test_snapshot(model, tmp_path):
    trained = train(model, "experts")
    save_snapshot(tmp_path / "s", {str(i): parameter for i, parameter in enumerate(trained)})
    plan = memory.training_memory(describe(model), WORK, "experts", torch.bfloat16, fisher="mc", checkpointing=False)
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
    planned = sum(memory.saved_bytes(describe(model), WORK, BFLOAT16, part, dropout=dropout > 0))
    assert planned == pytest.approx(saved_for_backward(model, dropout), rel=0.3)


def test_activations_where_expert_matrices_are_copied(monkeypatch):
    model = built(torch.float32)
    train(model, "experts")
    planned = sum(memory.saved_bytes(describe(model), WORK, Precision(4, 4, 4), "experts", dropout=True))
    with_kernel = saved_for_backward(model, 0.1)
    monkeypatch.setattr(grouped, "_kernel_fits", lambda x, other: False)  # as with float32 on a GPU
    copied = saved_for_backward(model, 0.1)
    assert copied > 2 * with_kernel
    assert planned == pytest.approx(copied, rel=0.3)
    assert memory._BLOCK_ROWS == grouped._BLOCK_ROWS


class TestPeaks:
    """Estimates of what is alive at once; batches large enough to outweigh the sums of the curvature pass."""

    work = replace(WORK, batch_size=8, tokens=64)

    @pytest.fixture
    def batch(self):
        generator = torch.Generator().manual_seed(1)
        return {"ids": torch.randint(50, (8, 64), generator=generator), "labels": torch.arange(8) % 4}

    @pytest.mark.parametrize("fisher", ["mc", "exact"])
    def test_curvature(self, model, batch, fisher):
        with LiveBytes() as live:
            live.known(model.parameters())
            collect_factors(model, class_logits, [batch], rank=WORK.rank, fisher=fisher)
        planned = memory.curvature_transients(describe(model), self.work, fisher, BFLOAT16)
        assert 0.85 * live.peak < planned < 1.5 * live.peak

    def test_prediction(self, model, fitted, batch):
        posterior = LaplacePosterior(fitted)
        with LiveBytes() as live:
            live.known(model.parameters())
            posterior.logit_covariance(model, class_logits, batch, centred=True)
        planned = memory.prediction_transients(describe(model), self.work, BFLOAT16)
        peak = live.peak + memory.factor_bytes(describe(model), WORK.rank)
        assert 0.85 * peak < planned < 1.5 * peak


def test_lpo_cache(model, fitted):
    batch = small_batch()
    cache = LaplacePosterior(fitted).validation_cache(model, class_logits, [batch, batch])
    held = sum(tensor.nbytes for tensor in vars(cache).values())
    assert memory.lpo_cache_bytes(describe(model), WORK, 2 * WORK.batch_size) == held


def plan_of(trained="down_proj", dtype=torch.bfloat16, **options):
    made = describe(built(torch.bfloat16))
    options = {"fisher": "exact", "checkpointing": False, **options}
    return memory.training_memory(made, WORK, trained, dtype, **options)


def test_float32_weights_double_what_is_trained_and_nothing_else():
    half, single = plan_of(), plan_of(dtype=torch.float32)
    assert single.gradients == 2 * half.gradients
    assert single.weights - half.weights == half.gradients
    assert single.activations > half.activations


def test_checkpointing_keeps_less_where_there_are_many_layers():
    assert plan_of(checkpointing=True).activations < plan_of().activations
    assert plan_of(checkpointing=True).curvature == plan_of().curvature


def test_what_fits():
    plan = plan_of()
    held = plan.weights + plan.gradients + plan.optimizer
    assert plan.peak == held + max(plan.activations, plan.step, plan.curvature)
    assert plan.fits(plan.peak / 0.95 / 2**30 * 1.001)
    assert not plan.fits(plan.peak / 0.95 / 2**30 * 0.999)
