"""Weights are recognised after merging, renaming and casting, and other weights are not."""

from __future__ import annotations

import copy
import json
import logging
from dataclasses import replace

import pytest
import torch
from oracles.models import answer_logits, as_modules, tiny_qwen, toy_batch, toy_model
from oracles.own_models import OwnMixture
from torch import nn

from bmoe_lightning.curvature import collect_factors
from bmoe_lightning.experts import expert_parameters, find_expert_layers
from bmoe_lightning.experts.weight_comparison import compare_weights, same_weights
from bmoe_lightning.experts.weight_record import WeightRecord, outside_record, weight_record
from bmoe_lightning.laplace import LaplacePosterior, WeightMismatchError

LEARNING_RATE = 5e-5
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def record(model):
    return weight_record(model, find_expert_layers(model))


def compare(fitted, model):
    return compare_weights(record(fitted), record(model))


def trained(model, steps=1):
    """A copy after some steps of AdamW on all weights of the experts."""
    model = copy.deepcopy(model)
    weights = [p for layer in find_expert_layers(model) for p in expert_parameters(model, layer).values()]
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator).to(weight)
        optimizer.step()
        optimizer.zero_grad()
    return model


def adapted(model, dtype=torch.float32, scale=0.05, **options):
    """The model with random adapters of PEFT in place."""
    peft = pytest.importorskip("peft")
    kind = options.pop("kind", "LoraConfig")
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = peft.get_peft_model(model.to(dtype), getattr(peft, kind)(**options))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "modules_to_save" not in name:
                parameter.data = parameter.data + torch.randn_like(parameter) * scale
    return model.eval()


ADAPTERS = {
    "lora": {"target_modules": ["fall"], "r": 2},
    "everywhere": {"target_modules": "all-linear", "r": 4},
    "dora": {"target_modules": ["fall"], "r": 2, "use_dora": True},
    "ia3": {"kind": "IA3Config", "target_modules": ["fall"], "feedforward_modules": ["fall"]},
    "loha": {"kind": "LoHaConfig", "target_modules": ["fall"], "r": 2},
    "saved": {"target_modules": ["fall"], "r": 2, "modules_to_save": ["head"]},
}


class TestMerging:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    @pytest.mark.parametrize("kind", ADAPTERS)
    def test_merged_adapters_are_the_same_weights(self, kind, dtype):
        model = adapted(as_modules(toy_model()), dtype, **ADAPTERS[kind])
        before = {name: (value.clone(), value._version) for name, value in model.state_dict().items()}
        merged = copy.deepcopy(model).merge_and_unload()
        assert compare(model, merged).same
        assert compare(merged, model).same
        after = {name: (value, value._version) for name, value in model.state_dict().items()}
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name][0], after[name][0]) for name in before)
        assert not any(getattr(module, "merged", False) for module in model.modules())

    @pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
    def test_another_step_of_the_adapters_is_not(self, kind):
        model = adapted(as_modules(toy_model()), **ADAPTERS[kind])
        further = copy.deepcopy(model)
        for name, parameter in further.named_parameters():
            if "lora_" in name or "ia3" in name:
                parameter.data += LEARNING_RATE
        assert not compare(model, further.merge_and_unload()).same
        assert not compare(model, copy.deepcopy(model).unload()).same

    @pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
    def test_merged_in_bfloat16(self, adapter_dtype):
        model = adapted(as_modules(toy_model()), torch.bfloat16, **ADAPTERS["everywhere"])
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(adapter_dtype)
        further = copy.deepcopy(model)
        for name, parameter in further.named_parameters():
            if "lora_B" in name:
                parameter.data = parameter.data + 0.01
        found = compare(model, copy.deepcopy(model).merge_and_unload())
        assert found.same
        assert found.casts == ()
        assert not compare(model, further.merge_and_unload()).same

    def test_adapters_of_fused_experts(self):
        peft = pytest.importorskip("peft")
        model = tiny_qwen(dtype=torch.float32)
        config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.down_proj"])
        with torch.random.fork_rng():
            torch.manual_seed(5)
            model = peft.get_peft_model(model, config).eval()
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.data = torch.randn_like(parameter) * 0.1
        merged = copy.deepcopy(model).merge_and_unload()
        assert compare(model, merged).same
        assert not compare(model, copy.deepcopy(model).unload()).same

    def test_disabled_adapters_are_left_out(self):
        model = adapted(as_modules(toy_model()), **ADAPTERS["lora"])
        base = copy.deepcopy(model).unload()
        assert not compare(model, base).same
        with model.disable_adapter():
            assert compare(model, base).same


class Holder(nn.Module):
    """A model under another attribute, with something beside it."""

    def __init__(self, name, model, beside=True):
        super().__init__()
        self.add_module(name, model)
        if beside:
            self.beside = nn.Linear(2, 2)


class Plain(nn.Module):
    """A mixture in no transformers model."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.head = nn.Linear(6, 4)
            self.blocks = nn.ModuleList(OwnMixture() for _ in range(2))


class TestRenaming:
    @pytest.mark.parametrize("make", [toy_model, tiny_qwen, Plain])
    def test_under_another_attribute(self, make):
        model, other = make(), make()
        inside = Holder("model", model, beside=False)
        beside = Holder("model", model)
        assert compare(beside, other).same
        assert compare(other, beside).same
        for there in (
            other,
            Holder("net", other, beside=False),
            Holder("a", Holder("b", other, beside=False), beside=False),
        ):
            found = compare(inside, there)
            assert found.same
            back = compare(there, inside)
            assert back.same
        with torch.no_grad():
            next(iter(expert_parameters(other, find_expert_layers(other)[0]).values())).add_(LEARNING_RATE)
        assert not compare(inside, other).same
        assert not compare(inside, Holder("net", other, beside=False)).same

    def test_parameters_beside_it_are_compared_or_named(self):
        model = Plain()
        inside = Holder("model", model)
        found = compare(inside, model)
        assert found.same
        assert found.left_out == ("beside.bias", "beside.weight")
        assert "not compared: beside.bias, beside.weight." in found.remarks()[0]
        other = Holder("net", model)
        assert set(compare(inside, other).differing) == {"beside.bias", "beside.weight"}

    def test_a_parameter_that_is_missing_within_it_differs(self):
        model = toy_model()
        other = copy.deepcopy(model)
        other.extra = nn.Parameter(torch.ones(2))
        assert compare(model, other).differing == ("extra",)


class TestCasting:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_a_cast_is_recognised_and_named(self, dtype):
        model = tiny_qwen(dtype=torch.float32)
        found = compare(model, copy.deepcopy(model).to(dtype))
        assert found.same
        assert found.casts == ((torch.float32, dtype),)
        (sentence,) = found.remarks()
        assert f"cast from float32 to {str(dtype).removeprefix('torch.')}" in sentence

    @pytest.mark.parametrize("scale", [1.0, 0.05])
    def test_a_cast_of_weights_one_step_further_is_refused(self, scale):
        model = tiny_qwen(dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(scale)
        further = trained(model)
        assert not compare(model, further).same
        found = compare(model, further.bfloat16())
        assert not found.same
        assert any("experts" in name for name in found.differing)
        assert "parameters differ" in found.reason()

    def test_a_step_after_a_cast_back_is_refused(self):
        model = tiny_qwen(dtype=torch.bfloat16)
        wider = copy.deepcopy(model).float()
        found = compare(model, wider)
        assert (found.same, found.casts) == (True, ())
        assert not compare(model, trained(wider)).same

    def test_one_weight_that_is_rounded_otherwise_is_refused(self):
        model = tiny_qwen(dtype=torch.float32)
        served = copy.deepcopy(model).bfloat16()
        with torch.no_grad():
            served.lm_head.weight.mul_(1 + 2**-7)
        assert compare(model, served).differing == ("lm_head.weight",)


class TestFiles:
    def test_there_and_back(self):
        fitted = record(tiny_qwen(dtype=torch.float32))
        again = WeightRecord.from_tensors(fitted.tensors())
        assert again == fitted
        assert again != record(tiny_qwen(seed=1, dtype=torch.float32))
        assert again != record(tiny_qwen(dtype=torch.float64))
        assert WeightRecord.from_tensors({}) is None

    def test_with_what_is_outside(self):
        model = Holder("model", tiny_qwen(dtype=torch.float32))
        fitted = replace(record(model), outside=outside_record(model, find_expert_layers(model)))
        again = WeightRecord.from_tensors(fitted.tensors())
        assert again == fitted != record(model)
        assert set(again.outside.samples) == {"beside.weight", "beside.bias"}
        earlier = {name: tensor for name, tensor in fitted.tensors().items() if not name.startswith("outside.")}
        assert WeightRecord.from_tensors(earlier) == record(model)
        damaged = {**fitted.tensors(), "outside.values": torch.zeros(1)}
        with pytest.raises(ValueError, match="record of the weights is damaged"):
            WeightRecord.from_tensors(damaged)

    @pytest.mark.parametrize("change", ["names", "values", "json"])
    def test_a_damaged_one_is_refused(self, change):
        tensors = record(toy_model()).tensors()
        described = json.loads(bytes(tensors["description"].tolist()))
        if change == "names":
            described["parameters"][0][2] = "no dtype"
        if change == "values":
            tensors["values"] = tensors["values"][:-1]
        text = json.dumps(described).encode()
        tensors["description"] = torch.frombuffer(bytearray(text if change != "json" else b"{"), dtype=torch.uint8)
        with pytest.raises(ValueError, match="record of the weights is damaged"):
            WeightRecord.from_tensors(tensors)

    def test_without_a_record_the_fingerprint_decides(self):
        model = toy_model()
        layers = find_expert_layers(model)
        assert same_weights(model, layers, "", None).same
        found = same_weights(model, layers, "0" * 64, None)
        assert (found.same, found.reason()) == (False, "")


class TestPosterior:
    def served(self, fitted, tmp_path):
        factors = collect_factors(fitted, answer_logits, [toy_batch()], rank=3)
        LaplacePosterior(factors, 0.7).save(tmp_path / "posterior.safetensors")
        return LaplacePosterior.load(tmp_path / "posterior.safetensors")

    def test_fitted_with_adapters_and_served_merged_under_another_name(self, tmp_path):
        model = adapted(as_modules(toy_model()), torch.float64, **ADAPTERS["everywhere"])
        posterior = self.served(model, tmp_path)
        expected = posterior.logit_covariance(model, answer_logits, toy_batch())
        merged = Holder("net", copy.deepcopy(model).merge_and_unload(), beside=False)
        found = posterior.logit_covariance(merged, lambda m, b: answer_logits(m.net, b), toy_batch())
        for here, there in zip(expected, found, strict=True):
            torch.testing.assert_close(there, here, rtol=1e-6, atol=1e-9)
        unmerged = copy.deepcopy(model).unload()
        with pytest.raises(WeightMismatchError, match=r"other weights than the model has \(\d+ parameters differ"):
            posterior.logit_covariance(unmerged, answer_logits, toy_batch())

    def test_served_cast_with_one_line_in_the_log(self, tmp_path, caplog):
        model = as_modules(toy_model()).float()
        posterior = self.served(model, tmp_path)
        served = copy.deepcopy(model).bfloat16()
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                posterior.predict(served, answer_logits, toy_batch())
        assert [r.getMessage() for r in caplog.records if "cast from float32 to bfloat16" in r.getMessage()] == [
            "the model has the weights of the fit cast from float32 to bfloat16. Predictions differ by the rounding of "
            "the cast; load the model in float32 to avoid that."
        ]
        with pytest.raises(WeightMismatchError):
            posterior.predict(trained(model).bfloat16(), answer_logits, toy_batch())
