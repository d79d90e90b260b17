"""Fused experts compute what the model's own implementations compute."""

import copy

import pytest
import torch
from oracles.models import (
    ToyExperts,
    answer_logits,
    looped_experts,
    tiny_qwen,
    toy_batch,
    toy_model,
)
from oracles.own_models import (
    assert_exact,
)
from torch import nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation

from bmoe_lightning.experts import (
    find_expert_layers,
)
from bmoe_lightning.experts.layouts.fused import fused_implementation, is_fused_experts
from recipes.supported_models.tiny import build

COMMON = {
    "vocab_size": 30,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "initializer_range": 0.3,
}


def gpt_oss(dtype):
    """Transposed weights, biases, interleaved gate."""
    model = GptOssForCausalLM(GptOssConfig(intermediate_size=12, **COMMON)).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter, std=0.2)
    return model


def mixtral(dtype):
    return MixtralForCausalLM(MixtralConfig(intermediate_size=12, **COMMON)).to(dtype).eval()


def qwen(dtype):
    return tiny_qwen(dtype=dtype)


def wide_qwen(dtype):
    """Widths that torch's grouped kernel takes."""
    return tiny_qwen(dtype=dtype, moe_intermediate_size=16)


def logits_and_gradients(model, batch, implementation):
    """Logits, and derivatives of a fixed combination of them in the embeddings and in every weight."""
    embedded = model.get_input_embeddings()(batch["ids"]).detach().requires_grad_()
    parameters = {name: p for name, p in model.named_parameters() if "embed_tokens" not in name}
    model.set_experts_implementation("eager" if implementation == "bmoe" else implementation)
    context = fused_implementation(model) if implementation == "bmoe" else torch.enable_grad()
    with context:
        logits = model(inputs_embeds=embedded, attention_mask=batch["mask"], use_cache=False).logits[:, -1]
        direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3)).to(logits.dtype)
        wanted = [embedded, *parameters.values()]
        found = torch.autograd.grad((logits * direction).sum(), wanted, materialize_grads=True)
    return logits.detach(), dict(zip(["embedded", *parameters], found, strict=True))


@pytest.mark.parametrize("build", [qwen, wide_qwen, mixtral, gpt_oss])
@pytest.mark.parametrize(("dtype", "implementation"), [(torch.float64, "eager"), (torch.float32, "grouped_mm")])
def test_equals_the_models_own_implementations(build, dtype, implementation):
    model, batch = build(dtype), toy_batch()
    expected, expected_gradients = logits_and_gradients(model, batch, implementation)
    logits, gradients = logits_and_gradients(model, batch, "bmoe")
    # transformers takes norms and router probabilities in float32, also in a float64 model.
    tolerance = 1e-6 if dtype == torch.float64 else 2e-5
    assert float((logits - expected).abs().max()) <= tolerance * float(expected.abs().max())
    touched = 0
    for name, gradient in expected_gradients.items():
        scale = float(gradient.abs().max())
        assert float((gradients[name] - gradient).abs().max()) <= 10 * tolerance * scale, name
        touched += scale > 0 and ("down_proj" in name or "gate_up_proj" in name)
    assert touched >= 4


def test_equals_a_float64_model_to_rounding():
    model, batch = toy_model(), toy_batch()
    expected = answer_logits(model, batch)[0]
    parameters = list(model.layers.parameters())
    expected_gradients = torch.autograd.grad(expected.sin().sum(), parameters, materialize_grads=True)
    with fused_implementation(model):
        logits = answer_logits(model, batch)[0]
    gradients = torch.autograd.grad(logits.sin().sum(), parameters, materialize_grads=True)
    torch.testing.assert_close(logits, expected, rtol=1e-13, atol=1e-13)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-12)


def plain_loop(self, hidden_states, top_k_index, top_k_weights):
    """Ungated, with biases and a norm after each expert, token by token."""
    rows = []
    for token, (experts, weights) in enumerate(zip(top_k_index, top_k_weights, strict=True)):
        total = 0
        for expert, weight in zip(experts.tolist(), weights, strict=True):
            hidden = self.act_fn(self.up_proj[expert] @ hidden_states[token] + self.up_proj_bias[expert])
            total = total + weight * self.post_expert_norm(
                self.down_proj[expert] @ hidden + self.down_proj_bias[expert]
            )
        rows.append(total)
    return torch.stack(rows)


@use_experts_implementation(has_gate=False, has_bias=True, has_post_expert_norm=True)
class UngatedExperts(nn.Module):
    def __init__(self, config):
        super().__init__()
        experts, inner, width = config.num_experts, config.inner, config.width
        self.num_experts = experts
        self.up_proj = nn.Parameter(torch.randn(experts, inner, width))
        self.up_proj_bias = nn.Parameter(torch.randn(experts, inner))
        self.down_proj = nn.Parameter(torch.randn(experts, width, inner))
        self.down_proj_bias = nn.Parameter(torch.randn(experts, width))
        self.act_fn = nn.ReLU()
        self.post_expert_norm = nn.LayerNorm(width)

    forward = plain_loop


def test_ungated_experts_with_bias_and_norm():
    model, batch = toy_model(), toy_batch()
    for layer in model.layers:
        layer.mixture.crew = UngatedExperts(model.config).double()
    expected = answer_logits(model, batch)[0]
    with fused_implementation(model):
        logits = answer_logits(model, batch)[0]
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("before", ["eager", "grouped_mm", "batched_mm"])
def test_what_was_set_before_comes_back(before):
    model = tiny_qwen(dtype=torch.float32, implementation=before)
    whole = model.get_experts_implementation()
    with fused_implementation(model):
        assert model.config._experts_implementation == "bmoe"
        with fused_implementation(model):
            pass
        assert model.config._experts_implementation == "bmoe"
    assert model.get_experts_implementation() == whole == {"": before}
    with pytest.raises(ZeroDivisionError), fused_implementation(model):
        raise ZeroDivisionError
    assert model.get_experts_implementation() == whole


def test_inside_another_module_and_twice():
    outer = nn.ModuleDict({"a": tiny_qwen(implementation="eager"), "b": tiny_qwen(implementation="batched_mm")})
    with fused_implementation(outer):
        assert [m.config._experts_implementation for m in outer.values()] == ["bmoe", "bmoe"]
    assert [m.config._experts_implementation for m in outer.values()] == ["eager", "batched_mm"]


def test_a_model_without_fused_experts_is_left_alone():
    with fused_implementation(nn.Linear(2, 2)):
        pass


def test_taken_name_is_refused():
    ours = ALL_EXPERTS_FUNCTIONS.get("bmoe")
    model = tiny_qwen()
    ALL_EXPERTS_FUNCTIONS.register("bmoe", plain_loop)
    try:
        with pytest.raises(RuntimeError, match="already has an experts implementation called 'bmoe'"):
            fused_implementation(model).__enter__()
        assert model.get_experts_implementation() == {"": "eager"}
    finally:
        if ours is None:
            del ALL_EXPERTS_FUNCTIONS._global_mapping["bmoe"]
        else:
            ALL_EXPERTS_FUNCTIONS.register("bmoe", ours)


def test_experts_beside_their_model_are_switched_too():
    """Bare ones, and those with a copy of the configuration, which the model's own switch does not reach."""
    model = toy_model()
    model.layers[1].mixture.crew.config = copy.deepcopy(model.config)
    bare = nn.ModuleDict({"crew": ToyExperts(toy_model().config), "model": model})
    with fused_implementation(bare):
        crews = [module for module in bare.modules() if is_fused_experts(module)]
        assert [crew.config._experts_implementation for crew in crews] == ["bmoe"] * 3
    assert [crew.config._experts_implementation for crew in crews] == ["eager"] * 3


def test_parts_of_a_configuration_keep_their_own():
    model = build("glm4v_moe").model
    model.config.vision_config._experts_implementation = "batched_mm"
    with fused_implementation(model):
        assert model.config.text_config._experts_implementation == "bmoe"
        assert model.config.vision_config._experts_implementation == "batched_mm"
    assert model.config.text_config._experts_implementation == "eager"
    assert model.config.vision_config._experts_implementation == "batched_mm"


def test_indices_beyond_the_experts_stand_for_none():
    """A router that lets a token go without a second expert says so with an index of E."""
    model = toy_model()
    crew = model.layers[0].mixture.crew
    x = torch.randn(3, 6, dtype=torch.float64)
    index, weights = torch.tensor([[0, 1], [2, 4], [4, 3]]), torch.rand(3, 2, dtype=torch.float64)
    with fused_implementation(model):
        output = crew(x, index, weights)
    torch.testing.assert_close(output, looped_experts(crew, x, index, weights), rtol=1e-12, atol=1e-14)


def test_no_slots_at_all():
    """An empty batch of tokens, as a shard may get."""
    model = toy_model()
    crew = model.layers[0].mixture.crew
    with fused_implementation(model):
        empty = torch.zeros(0, 2, dtype=torch.int64)
        output = crew(torch.zeros(0, 6, dtype=torch.float64), empty, empty.double())
    assert output.shape == (0, 6)


def test_fused_experts_called_twice():
    model = toy_model()
    mixture = model.layers[1].mixture
    once = mixture.forward
    mixture.forward = lambda x: once(torch.tanh(once(x)) + x)
    assert_exact(model, find_expert_layers(model))
