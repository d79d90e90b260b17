"""What makes each family small: settings shared by name, and per family what the shared ones do not cover."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

VOCABULARY = 40

SMALL: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 16,
    "d_model": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 10,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "index_head_dim": 8,
    "index_n_heads": 2,
    "tie_word_embeddings": False,
    "use_cache": False,
}

# Vision and audio towers beside the language model: text never enters them, so they only have to be small.
SMALL_TOWER: Mapping[str, Any] = {
    "depth": 1,
    "embed_dim": 16,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "encoder_layers": 1,
    "d_model": 16,
    "deepstack_visual_indexes": [0],
    "downsample_hidden_size": 4,
    "fullatt_block_indexes": [0],
    "global_attn_indexes": [0],
    "head_dim": 8,
    "hidden_size": 16,
    "image_size": 28,
    "intermediate_size": 16,
    "max_position_embeddings": 64,
    "num_attention_heads": 2,
    "num_heads": 2,
    "num_hidden_layers": 1,
    "num_key_value_heads": 2,
    "num_position_embeddings": 16,
    "out_hidden_size": 16,
    "output_channels": 16,
    "output_dim": 16,
    "patch_size": 14,
    "temporal_patch_size": 1,
    "text_hidden_size": 16,
    "vocab_size": VOCABULARY,
}


@dataclass(frozen=True)
class FamilySettings:
    """What one family needs.

    Attributes:
        config: keyword arguments of its configuration, nested as the configuration is.
        model_class: name of the class to build, where the usual heads are not it.
        call: keyword arguments of every forward.
        dtype: of weights and activations.
        takes_padding: whether a batch may be padded on the left.
        is_encoder_decoder: whether the forward wants decoder tokens.
        refused: why there is no tiny model.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    model_class: str | None = None
    call: Mapping[str, Any] = field(default_factory=lambda: {"use_cache": False})
    dtype: torch.dtype = torch.float64
    takes_padding: bool = True
    is_encoder_decoder: bool = False
    refused: str | None = None


OVERRIDES: Mapping[str, FamilySettings] = {}
