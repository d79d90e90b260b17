"""Tiny dense language models with random weights, as folders, and what they and their mixtures of experts compute."""

from __future__ import annotations

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from bmoe_lightning.data.tokenizer import train_word_tokenizer
from bmoe_lightning.models.loading import load_causal_model
from recipes.upcycle.architecture import dense_tensors, empty_model, moe_config
from recipes.upcycle.comparison import SAMPLE_TEXT
from recipes.upcycle.settings import UpcycleSettings
from recipes.upcycle.weights import Upcycling

FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
}
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-3,
    "bos_token_id": 2,
    "eos_token_id": 3,
}


def tokenizer():
    return train_word_tokenizer([SAMPLE_TEXT], max_vocab=500)


def dense_model(family="llama", dtype=torch.float32, **changes):
    """A model in which no weight is zero or small, so that each matters."""
    config_class, model_class = FAMILIES[family]
    if family == "mistral":
        changes = {"sliding_window": None, **changes}
    model = model_class(config_class(**{"vocab_size": len(tokenizer()), **SIZES, **changes})).to(dtype).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.3 * noise)
    return model


def save(folder, model):
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def settings(**changes):
    return UpcycleSettings(**{"model": "", "output": "", "experts": 4, **changes})


def upcycled(folder, dense, **changes):
    """The mixture of experts of a model, through its file."""
    chosen = settings(**changes)
    config = moe_config(dense.config, chosen)
    config.dtype = dense.dtype
    folder.mkdir(exist_ok=True)
    config.save_pretrained(folder)
    made = Upcycling(dense_tensors(dense.state_dict(), empty_model(config)), config, chosen)
    save_file({name: tensor.clone() for name, tensor in made}, folder / "model.safetensors", {"format": "pt"})
    model = load_causal_model(str(folder))
    model.set_experts_implementation("eager")  # the default one multiplies no matrices of float64
    return model


@torch.no_grad()
def logits(model, length=40):
    ids = torch.randint(3, model.config.vocab_size, (4, length), generator=torch.Generator().manual_seed(2))
    return model(input_ids=ids, use_cache=False).logits
