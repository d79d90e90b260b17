"""Models from GGUF files."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import upcycle_cases as cases
from tokenizers.pre_tokenizers import ByteLevel

from bmoe_lightning.models import loading
from bmoe_lightning.models.loading import MissingPackageError, load_causal_model, load_tokenizer
from bmoe_lightning.utils.late_import import how_to_install
from recipes.upcycle.__main__ import main

FILE = "tiny.gguf"
MERGES = ["h e", "l l", "he ll", "hell o"]
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip

needs_gguf = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="the optional package gguf")


def gguf_name(name):
    fixed = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    base = name.removesuffix(".weight")
    if base in fixed:
        return f"{fixed[base]}.weight"
    _, _, layer, rest = base.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}.weight"


def interleaved(weight, heads):
    """The order of the rows of queries and keys in GGUF files: pairs that are rotated together are neighbours."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_gguf(path, model, quantised=False):
    """Write a Llama model and a byte-level tokenizer as llama.cpp's converter does."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens())
    writer.add_token_types([3, 3, *[1] * (len(tokens()) - 2)])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, tensor in model.state_dict().items():
        value = tensor.float()
        if "q_proj" in name:
            value = interleaved(value, config.num_attention_heads)
        if "k_proj" in name:
            value = interleaved(value, config.num_key_value_heads)
        array = value.contiguous().numpy()
        if quantised and value.dim() == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(gguf_name(name), gguf.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tokens():
    return ["<s>", "</s>", *sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]


def llama():
    return cases.dense_model(vocab_size=len(tokens()), hidden_size=32, intermediate_size=64)


@needs_gguf
def test_a_gguf_file_is_upcycled(tmp_path, capsys):
    dense = llama()
    write_gguf(tmp_path / FILE, dense)
    output = tmp_path / "moe"
    assert main(["--model", str(tmp_path), "--gguf-file", FILE, "--output", str(output)]) == 0
    assert f"{FILE})" in (output / "README.md").read_text()
    expected = cases.logits(dense)
    moe = load_causal_model(str(output))
    assert getattr(moe.config, "quantization_config", None) is None
    torch.testing.assert_close(cases.logits(moe), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    [first, *_] = load_tokenizer(str(output))("hello there", add_special_tokens=False)["input_ids"]
    assert first == tokens().index("hello")


@needs_gguf
def test_quantised_weights_are_dequantised(tmp_path):
    dense = llama()
    write_gguf(tmp_path / FILE, dense, quantised=True)
    assert main(["--model", str(tmp_path), "--gguf-file", FILE, "--output", str(tmp_path / "moe")]) == 0
    original, found = cases.logits(dense), cases.logits(load_causal_model(str(tmp_path / "moe")))
    error = float((found - original).norm() / original.norm())
    assert 1e-5 < error < 0.1
    reference = cases.logits(load_causal_model(str(tmp_path), gguf_file=FILE))
    torch.testing.assert_close(found, reference, rtol=0, atol=1e-5 * float(reference.abs().max()))


@needs_gguf
def test_a_file_that_is_not_there_is_1(tmp_path, capsys):
    write_gguf(tmp_path / FILE, llama())
    assert main(["--model", str(tmp_path), "--gguf-file", "other.gguf", "--output", str(tmp_path / "moe")]) == 1
    assert "error: the model" in capsys.readouterr().err


def test_a_missing_package_is_1_and_names_the_extra(tmp_path, capsys, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(loading, "find_spec", lambda name: None if name == "gguf" else found(name))
    assert main(["--model", str(tmp_path), "--gguf-file", FILE, "--output", str(tmp_path / "moe")]) == 1
    sentence = "error: transformers reads the GGUF file 'tiny.gguf' with gguf, which cannot be imported"
    assert capsys.readouterr().err == f"{sentence}; {how_to_install('gguf')}\n"
    for load in (load_causal_model, load_tokenizer):
        with pytest.raises(MissingPackageError, match="gguf"):
            load(str(tmp_path), gguf_file=FILE)
