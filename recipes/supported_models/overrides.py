"""Configuration overrides that make each family small: some shared by name, others for single families."""

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
    "tie_word_embeddings": False,
    "use_cache": False,
    "max_position_embeddings": 64,
    # Width and depth. The experts' inner width differs from the model's, so that a transposed weight cannot pass.
    "hidden_size": 16,
    "d_model": 16,
    "num_hidden_layers": 3,
    "intermediate_size": 24,
    "dense_intermediate_size": 24,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 10,
    "shared_experts_intermediate_size": 10,
    "moe_shared_expert_intermediate_size": 10,
    "shared_intermediate_size": 10,
    "share_expert_dim": 10,
    # Experts; the first layer is dense where a family supports that.
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "mlp_only_layers": [0],
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    # Attention. Windows and selections are shorter than a sequence, so that they have an effect.
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "index_head_dim": 8,
    # So many that no score of a key is zero: equal scores would be ordered by chance.
    "index_n_heads": 16,
    "index_topk": 4,
    "sliding_window": 4,
    "sliding_window_size": 4,
    # Linear attention, Mamba and hyper-connections.
    "linear_conv_kernel_dim": 3,
    "linear_head_dim": 8,
    "linear_num_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "mamba_d_state": 8,
    "use_mamba_kernels": False,
    "hc_mult": 2,
}

# Vision and audio towers: text does not pass through them, so they only have to be small.
SMALL_TOWER: Mapping[str, Any] = {
    "depth": 1,
    "embed_dim": 16,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "encoder_layers": 1,
    "d_model": 16,
    "deepstack_visual_indexes": [0],
    "downsample_channels": [8, 16],
    "downsample_hidden_size": 4,
    "global_attn_indexes": [0],
    "head_dim": 8,
    "hidden_size": 16,
    "image_size": 56,
    "intermediate_size": 16,
    "max_position_embeddings": 64,
    "mlp_dim": 16,
    "num_attention_heads": 2,
    "num_heads": 2,
    "num_hidden_layers": 1,
    "num_key_value_heads": 2,
    "num_position_embeddings": 16,
    "out_hidden_size": 16,
    "output_channels": 8,
    "output_dim": 16,
    "patch_size": 14,
    "projection_intermediate_size": 16,
    "projector_input_dim": 16,
    "projector_output_dim": 16,
    "temporal_patch_size": 1,
    "text_hidden_size": 16,
    "vision_output_dim": 16,
    "vocab_size": VOCABULARY,
    "window_size": 2,
}


@dataclass(frozen=True)
class FamilySettings:
    """Settings of one family.

    Attributes:
        config: Keyword arguments of its configuration, nested as the configuration is.
        model_class: Name of the class to build, if it is none of the usual heads.
        call: Keyword arguments of every forward.
        dtype: Dtype of weights and activations.
        takes_padding: Whether a batch may be padded on the left.
        padding_dtype: Dtype of the weights in the comparison of padded rows; None for `dtype`.
        is_encoder_decoder: Whether the forward takes decoder tokens.
        image_marker: Name of the input `[B, T]` that is 1 at image tokens; the first batch then has some.
        wrapper: Keyword arguments of the configuration of its multimodal wrapper, `text_config` aside, where the model
            above is the text model alone.
        remark: Note for readers of the table.
        refused: Reason why there is no tiny model.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    model_class: str | None = None
    call: Mapping[str, Any] = field(default_factory=lambda: {"use_cache": False})
    dtype: torch.dtype = torch.float64
    takes_padding: bool = True
    padding_dtype: torch.dtype | None = None
    is_encoder_decoder: bool = False
    image_marker: str | None = None
    wrapper: Mapping[str, Any] = field(default_factory=dict)
    remark: str | None = None
    refused: str | None = None


_SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
_LINEAR = ["linear_attention", "full_attention", "linear_attention"]
_INKLING = {
    "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"],
    "swa_num_attention_heads": 2,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "d_rel": 4,
    "rel_extent": 8,
}
# Multimodal rotary embeddings: how the rotated half of a head is split over time, height and width.
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_HALF_MROPE = _MROPE | {"partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]}


def _config(**config: Any) -> FamilySettings:
    return FamilySettings(config=config)


OVERRIDES: Mapping[str, FamilySettings] = {
    "afmoe": _config(layer_types=_SLIDING),
    "aria": FamilySettings(
        wrapper={
            "vision_config": {"model_type": "idefics3_vision", **SMALL_TOWER},
            "projector_patch_to_query_dict": {16: 4},
        }
    ),
    "bailing_hybrid": _config(layer_types=_LINEAR, short_conv_kernel_size=3),
    "bmoe_lightning.deepseek_moe": FamilySettings(remark="DeepSeek-MoE-16B, class of this library"),
    "cohere2_moe": _config(layer_types=_SLIDING, logit_scale=1.0, prefix_dense_intermediate_size=20),
    "dbrx": _config(
        n_heads=2,
        n_layers=2,
        max_seq_len=64,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        ffn_config={"ffn_hidden_size": 12, "moe_top_k": 2},
    ),
    "deepseek_v4": FamilySettings(
        config={
            "num_key_value_heads": 1,
            "partial_rotary_factor": 0.5,
            "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
            "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
            "mlp_layer_types": ["hash_moe", "moe", "moe"],
            "o_groups": 2,
            "o_lora_rank": 8,
        },
        # It compresses neighbouring keys into one, padding among them.
        takes_padding=False,
    ),
    "diffusion_gemma": FamilySettings(
        config={
            "text_config": {"layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2},
            "canvas_length": 3,
            # Ties all layers of encoder and decoder, not only the embeddings.
            "tie_word_embeddings": True,
            "vision_config": {"model_type": "gemma4_vision", **SMALL_TOWER, "position_embedding_size": 16},
        },
        model_class="DiffusionGemmaForBlockDiffusion",
        # The canvas reads the prompt from the cache.
        call={},
        is_encoder_decoder=True,
        # The canvas would need a separate mask over prompt and canvas.
        takes_padding=False,
    ),
    "doge": FamilySettings(
        config={"is_moe": True, "keep_window_size": 4},
        # Its router mixes the scores of different tokens, padding among them.
        takes_padding=False,
    ),
    "dots3_note": FamilySettings(
        config={
            "layer_types": ["indexed_attention", "sliding_attention", "indexed_attention"],
            "swa_num_attention_heads": 2,
            "swa_num_key_value_heads": 2,
            "swa_q_lora_rank": 8,
            "swa_kv_lora_rank": 8,
            "swa_head_dim": 12,
            "swa_qk_nope_head_dim": 8,
            "swa_v_head_dim": 8,
        },
        # Its vision tower has experts too.
        wrapper={
            "vision_config": {
                "pyramid_num_routed": [4],
                "moe_intermediate_size": 12,
                "mlp_layer_types": ["sparse"],
                "adapter_in_dim": 16,
                "adapter_out_dim": 16,
            },
            "audio_config": {"adapter_input_size": 16, "adapter_out_dim": 16},
        },
    ),
    "ernie4_5_vl_moe": FamilySettings(
        config={
            "text_config": {
                "moe_intermediate_size": [12, 10],
                "rope_parameters": _MROPE | {"mrope_section": [1, 1, 2]},
            }
        },
        model_class="Ernie4_5_VLMoeForConditionalGeneration",
        # Image tokens have separate experts, which text alone would never reach.
        image_marker="moe_mm_token_type_ids",
    ),
    "exaone_moe": _config(layer_types=_SLIDING),
    "flint": _config(layer_types=_SLIDING),
    "gemma4": _config(
        enable_moe_block=True,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        global_head_dim=8,
        hidden_size_per_layer_input=4,
        vocab_size_per_layer_input=VOCABULARY,
    ),
    "glm4v_moe": _config(text_config={"rope_parameters": _HALF_MROPE}),
    "glm5_next": _config(
        text_config={
            "qk_rope_head_dim": 0,
            "layer_types": ["linear_attention", "indexed_attention", "linear_attention"],
            "index_kpool": 2,
        },
    ),
    "granitemoe_swa": FamilySettings(
        config={"layer_types": _SLIDING},
        # Its attention casts the mask to float32, where the smallest float64 is -inf: a padded row becomes NaN.
        takes_padding=False,
        padding_dtype=torch.float32,
    ),
    "granitemoehybrid": _config(layer_types=_LINEAR, mamba_n_heads=4, mamba_chunk_size=4),
    "inkling": FamilySettings(
        config={**_INKLING, "logits_mup_width_multiplier": 1.0},
        # With fewer layers than scales it would need scipy.
        wrapper={"vision_config": {"patch_size": 2, "temporal_patch_size": 2, "num_hidden_layers": 3}},
    ),
    "inkling2": FamilySettings(
        config={**_INKLING, "unpadded_vocab_size": VOCABULARY, "n_layers_per_attn_res_block": 2},
        # Its norms hand float32 to linear layers, whatever the weights are.
        dtype=torch.float32,
    ),
    # Mamba, attention, Mamba, Mamba; dense and sparse in turn.
    "jamba": _config(num_hidden_layers=4, attn_layer_period=4, attn_layer_offset=1),
    "jetmoe": _config(kv_channels=8),
    "kimi_linear": _config(layer_types=_LINEAR, q_lora_rank=None),
    "kolibri1": _config(layer_types=_SLIDING),
    "laguna": _config(layer_types=_SLIDING),
    "lfm2_moe": _config(layer_types=["conv", "full_attention", "conv"]),
    "llama4": _config(
        intermediate_size=12,
        intermediate_size_mlp=24,
        moe_layers=[1, 2],
        layer_types=["chunked_attention", "full_attention", "chunked_attention"],
        attention_chunk_size=4,
    ),
    "longcat_flash": _config(
        num_layers=2, head_dim=4, ffn_hidden_size=24, expert_ffn_hidden_size=12, zero_expert_num=2
    ),
    "mellum": _config(layer_types=_SLIDING),
    # Sliding layers have twice the key heads.
    "mimo_v2_flash": _config(layer_types=_SLIDING, head_dim=12, num_key_value_heads=1),
    "minimax": _config(layer_types=_LINEAR, block_size=4),
    "minimax_m3_vl": _config(
        layer_types=["full_attention", "minimax_m3_sparse", "full_attention"],
        rotary_dim=4,
        index_n_heads=2,
        index_block_size=2,
        index_topk_blocks=2,
    ),
    "mistral_large4": _config(vision_config={"model_type": "pixtral", **SMALL_TOWER}),
    "muse_spark": _config(
        text_config={
            "moe_hidden_size": 10,
            "output_multiplier": 1.0,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        audio_config={"num_hidden_layers": 1, "patch_sizes": [4], "hidden_sizes": [16], "depths": [1]},
        out_hidden_size=16,
        projector_hidden_size=16,
    ),
    "nemotron_h": _config(
        layers_block_type=["linear_attention", "moe", "full_attention", "mlp", "moe"],
        mamba_num_heads=4,
        mamba_head_dim=8,
        ssm_state_size=8,
        n_groups=2,
        chunk_size=4,
    ),
    "nllb_moe": FamilySettings(
        config={
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_ffn_dim": 24,
            "decoder_ffn_dim": 24,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_sparse_step": 2,
            "decoder_sparse_step": 2,
        },
        is_encoder_decoder=True,
    ),
    "qwen3_5_moe": _config(layer_types=_LINEAR),
    "qwen3_next": _config(layer_types=_LINEAR),
    "qwen3_omni_moe": FamilySettings(
        config={"text_config": {"rope_parameters": _MROPE}, "vision_start_token_id": VOCABULARY - 1},
        model_class="Qwen3OmniMoeThinkerForConditionalGeneration",
    ),
    "qwen3_vl_moe": _config(text_config={"rope_parameters": _MROPE}),
    "qwen4_exp": _config(
        layer_types=["linear_attention", "indexed_attention", "linear_attention"],
        hc_count=2,
        hc_lowrank=4,
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=8,
        indexer_budget=4,
        indexer_compress_ratio=2,
    ),
    "step3p7": _config(text_config={"layer_types": _SLIDING}),
    "switch_transformers": FamilySettings(
        config={
            "d_ff": 24,
            "d_kv": 8,
            "num_layers": 2,
            "num_decoder_layers": 2,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
            "num_heads": 2,
        },
        is_encoder_decoder=True,
    ),
    "vitpose_backbone": FamilySettings(
        refused="a vision backbone without logits, whose data set's number picks the expert: there is no router",
    ),
    "zaya": _config(num_experts_per_tok=1, router_hidden_size=32, layer_types=["hybrid", "hybrid_sliding", "hybrid"]),
}


def settings_of(family: str) -> FamilySettings:
    """The settings of a family; the defaults if it has none."""
    return OVERRIDES.get(family, FamilySettings())
