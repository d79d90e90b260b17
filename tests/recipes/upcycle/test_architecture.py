"""Configurations of upcycled models, and models that are refused."""

from __future__ import annotations

import pytest
import torch
import upcycle_cases as cases
from transformers import GemmaConfig, MistralConfig, Qwen3Config

from recipes.upcycle.architecture import CannotUpcycleError, dense_tensors, empty_model, moe_config, upcycled_layers


def empty_of(dense, **changes):
    return empty_model(moe_config(dense.config, cases.settings(**changes)))


def test_what_the_models_share_is_copied():
    changes = {
        "head_dim": 8, "tie_word_embeddings": True, "rms_norm_eps": 1e-4, "max_position_embeddings": 99,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 77.0}, "attention_dropout": 0.25,
        "initializer_range": 0.5, "pad_token_id": 0, "bos_token_id": 5, "eos_token_id": [6, 7], "hidden_act": "gelu",
    }  # fmt: skip
    dense = cases.dense_model(**changes)
    found = moe_config(dense.config, cases.settings(experts=8, top_k=2))
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", *changes)
    assert {name: getattr(found, name) for name in same} == {name: getattr(dense.config, name) for name in same}
    assert found.rope_parameters is not dense.config.rope_parameters
    assert (found.num_experts, found.num_experts_per_tok, found.norm_topk_prob) == (8, 2, True)
    assert (found.mlp_only_layers, found.decoder_sparse_step) == ([0], 1)
    assert getattr(found, "quantization_config", None) is None


@pytest.mark.parametrize(
    ("layers", "count", "expected"),
    [("all", 4, range(4)), ("upper-half", 4, range(2, 4)), ("upper-half", 5, range(2, 5)), ("3", 5, range(2, 5))],
)
def test_layers(layers, count, expected):
    assert upcycled_layers(layers, count) == expected


@pytest.mark.parametrize(
    ("config", "changes", "sentence"),
    [
        (GemmaConfig(), {}, "type 'gemma' cannot be upcycled exactly; those of type llama, mistral, qwen2 can"),
        (Qwen3Config(), {}, "type 'qwen3' cannot"),
        (MistralConfig(sliding_window=64), {}, "attention has a window of 64 tokens"),
        (MistralConfig(sliding_window=None), {"layers": "33"}, "the model has 32 layers; give --layers 32 at most"),
        (MistralConfig(sliding_window=None, intermediate_size=36), {"segments": 8}, "36 wide, which --segments 8 does"),
    ],
)
def test_configurations_that_are_refused(config, changes, sentence):
    with pytest.raises(CannotUpcycleError, match=sentence):
        moe_config(config, cases.settings(**changes))


def test_a_window_that_no_text_reaches_is_none():
    config = moe_config(MistralConfig(sliding_window=4096, max_position_embeddings=4096), cases.settings())
    assert set(config.layer_types) == {"full_attention"}


def test_a_quantised_model_is_refused():
    config = cases.dense_model().config
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(CannotUpcycleError, match="quantised from"):
        moe_config(config, cases.settings())


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"mlp_bias": True}, r"layers\.0\.mlp\.down_proj\.bias"),
        ({"attention_bias": True}, r"layers\.0\.self_attn\.o_proj\.bias"),
    ],
)
def test_biases_that_have_no_place_are_refused_unless_they_are_zero(changes, names):
    dense = cases.dense_model(**changes)
    with pytest.raises(CannotUpcycleError, match=f"no exact place.*{names}"):
        dense_tensors(dense.state_dict(), empty_of(dense))
    for name, parameter in dense.named_parameters():
        if "bias" in name and not name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias")):
            torch.nn.init.zeros_(parameter)
    found = dense_tensors(dense.state_dict(), empty_of(dense))
    assert not [name for name in found if name.endswith(("o_proj.bias", "down_proj.bias"))]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda state: state | {"model.layers.0.self_attn.q_norm.weight": torch.ones(4)}, "no exact place.*q_norm"),
        (lambda state: {n: t for n, t in state.items() if "1.self_attn.k_proj" not in n}, "lacks some: .*1.*k_proj"),
        (lambda state: {n: t[:-1] if n == "model.norm.weight" else t for n, t in state.items()}, r"model\.norm"),
        (lambda state: {n: t.char() if "embed" in n else t for n, t in state.items()}, "quantised.*embed_tokens"),
        (lambda state: {n: t / 0 if "up_proj" in n else t for n, t in state.items()}, "infinite.*up_proj"),
    ],
)
def test_weights_that_are_refused(change, sentence):
    dense = cases.dense_model()
    with pytest.raises(CannotUpcycleError, match=sentence):
        dense_tensors(change(dense.state_dict()), empty_of(dense))


def test_a_tied_output_matrix_is_not_written_twice():
    dense = cases.dense_model(tie_word_embeddings=True)
    assert "lm_head.weight" in dense.state_dict()
    assert "lm_head.weight" not in dense_tensors(dense.state_dict(), empty_of(dense))
