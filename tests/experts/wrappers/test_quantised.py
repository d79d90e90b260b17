"""Quantised layers: refused as experts, and welcome elsewhere if they have a backward pass."""

import pytest
import torch
from oracles.cases import covariance
from oracles.models import answer_logits, as_modules, tiny_qwen, toy_batch, toy_model
from torch import nn
from transformers import BitsAndBytesConfig, Qwen2MoeForCausalLM

from bmoe_lightning.experts import (
    find_expert_layers,
    find_linear_layers,
    weight_fingerprint,
)
from bmoe_lightning.experts.wrappers.quantised import has_quantised_linear, is_packed, unusable

BATCH = toy_batch()


class PackedLinear(nn.Module):
    """A quantised layer as many libraries write it: no `nn.Linear`, no weight, packed numbers."""

    def __init__(self, linear, passes_gradient=True):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("qweight", linear.weight.detach().mul(64).round().to(torch.int8))
        self.passes_gradient = passes_gradient

    def forward(self, x):
        output = x @ (self.qweight.to(x.dtype) / 64).T
        return output if self.passes_gradient else output.detach()


class TestQuantised:
    def test_experts_that_are_packed_modules(self):
        model = as_modules(toy_model())
        for expert in model.layers[0].mixture.crew:
            expert.fall = PackedLinear(expert.fall)
        with pytest.raises(ValueError, match=r"crew.0.fall' are quantised \(NoneType\).*other layers may be quantised"):
            find_expert_layers(model)

    @pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
    def test_fused_experts_in_a_narrow_type(self, dtype):
        model = toy_model()
        crew = model.layers[0].mixture.crew
        crew.down_proj = nn.Parameter(crew.down_proj.detach().to(dtype), requires_grad=False)
        with pytest.raises(ValueError, match=rf"'layers.0.mixture.crew' are quantised \({dtype}\)"):
            find_expert_layers(model)

    def test_experts_of_a_class_of_its_own(self):
        """As MXFP4 leaves them: no experts interface, a packed attribute."""

        class Mxfp4Experts(nn.Module):
            def __init__(self):
                super().__init__()
                self.down_proj = torch.zeros(4, 6, 5, dtype=torch.uint8)

        model = nn.ModuleDict({"experts": Mxfp4Experts()})
        with pytest.raises(ValueError, match=r"'experts' are quantised \(torch.uint8\)"):
            find_expert_layers(model)

    def test_some_of_the_layers(self):
        """A part of the experts left out in silence would be no posterior over the experts."""
        model = toy_model()
        crew = model.layers[0].mixture.crew
        del crew.down_proj
        crew.down_proj = torch.zeros(4, 6, 5, dtype=torch.uint8)
        with pytest.raises(ValueError, match=r"'layers.0.mixture.crew' are quantised"):
            find_expert_layers(model)
        crew.down_proj = torch.zeros(4, 6, 5)
        with pytest.raises(ValueError, match=r"'layers.0.mixture.crew' are parametrised"):
            find_expert_layers(model)

    def test_other_layers_may_be_quantised(self):
        model = toy_model()
        rounded = toy_model()
        for layer, reference in zip(model.layers, rounded.layers, strict=True):
            layer.query = PackedLinear(layer.query)
            reference.query.weight.data = layer.query.qweight.double() / 64
        torch.testing.assert_close(covariance(model), covariance(rounded))

    def test_a_layer_that_passes_no_gradient_is_noticed(self):
        model = toy_model()
        model.layers[1].value = PackedLinear(model.layers[1].value, passes_gradient=False)
        with pytest.raises(RuntimeError, match=r"'layers.1.value' \(PackedLinear\) passes no gradient to its input"):
            covariance(model)
        with torch.no_grad():
            answer_logits(model, BATCH)  # the watch is gone

    @pytest.mark.parametrize("bits", [4, 8])
    def test_bitsandbytes_leaves_fused_experts_alone(self, bits, tmp_path):
        """Everything around the experts is quantised; the posterior is that of a model with the rounded weights."""
        pytest.importorskip("bitsandbytes")
        config = {"hidden_size": 64, "shared_expert_intermediate_size": 64}
        # A matrix of one row is more than the kernels of some CPUs can take.
        skipped = ["lm_head", *(f"model.layers.{i}.mlp.shared_expert_gate" for i in range(2))]
        tiny_qwen(dtype=torch.bfloat16, **config).save_pretrained(tmp_path)
        options = {f"load_in_{bits}bit": True, "llm_int8_skip_modules": skipped}
        model = Qwen2MoeForCausalLM.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(**options))
        kind = type(model.model.layers[0].self_attn.q_proj).__name__
        assert kind == {4: "Linear4bit", 8: "Linear8bitLt"}[bits]
        layers = find_expert_layers(model)
        assert [layer.layout for layer in layers] == ["fused"] * 2
        fingerprint = weight_fingerprint(model, layers)
        found = covariance(model)
        assert weight_fingerprint(model, layers) == fingerprint
        expected = covariance(tiny_qwen(dtype=torch.bfloat16, **config))
        assert 0.3 < float(found.diagonal(dim1=1, dim2=2).sum() / expected.diagonal(dim1=1, dim2=2).sum()) < 3
        with pytest.raises(ValueError, match=r"'model.layers.0.self_attn.q_proj' are quantised"):
            find_linear_layers(model, "*.q_proj")


def test_unusable_weights():
    weight = nn.Parameter(torch.zeros(2, 2))
    assert unusable(weight) is None
    assert unusable(None) == "quantised (NoneType)"
    assert unusable(torch.zeros(2, dtype=torch.int8)) == "quantised (torch.int8)"
    packed = torch.masked.masked_tensor(torch.zeros(2), torch.ones(2, dtype=torch.bool))
    assert not is_packed(weight)
    assert not is_packed(packed)  # a subclass that stores its values itself


def test_tensors_that_store_values_in_others():
    two_tensor = pytest.importorskip("torch.testing._internal.two_tensor")
    packed = two_tensor.TwoTensor(torch.zeros(2), torch.zeros(2))
    assert is_packed(packed)
    assert unusable(packed) == "quantised (TwoTensor)"


def test_a_quantised_layer_in_torchscript_is_one():
    class Scripted(nn.Module):
        """Sizes and packed weight, as a dynamically quantised layer of torch has them."""

        def __init__(self):
            super().__init__()
            self.in_features, self.out_features = 4, 3
            self.register_buffer("weight", torch.zeros(3, 4, dtype=torch.int8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight.float().t()

    assert has_quantised_linear(nn.Sequential(torch.jit.script(Scripted())))
