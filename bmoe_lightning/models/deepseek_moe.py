"""DeepSeekMoE (`deepseek-ai/deepseek-moe-16b-base` and its fine-tunes), model type `deepseek`.

Architecture: Dai et al., "DeepSeekMoE: Towards Ultimate Expert Specialization in Mixture-of-Experts Language Models"
(https://arxiv.org/abs/2401.06066), Section 3. It is Llama's decoder, with a mixture of experts instead of the MLP in
all but the first layers, which maps a normalised token u to

    sum over the top k of all routed experts of s_i FFN_i(u), plus shared FFN(u),   s = softmax(W u)

where the `s_i` of the chosen experts are normalised to a sum of one only if `norm_topk_prob` is set, and the shared
experts are one MLP of their total width, without a gate.
"""

from typing import ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers import initialization as init
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.integrations.moe import use_experts_implementation
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaMLP,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts, Qwen2MoeMLP


@strict
class DeepseekMoeConfig(LlamaConfig):
    """Configuration of a DeepSeekMoE model; the defaults are those of the published 16B model.

    Fields that `LlamaConfig` has mean the same here.

    Attributes:
        moe_intermediate_size: Width of one expert; `intermediate_size` is that of a dense layer.
        n_shared_experts: Number of shared experts; None or 0 for none.
        n_routed_experts: Number of routed experts.
        num_experts_per_tok: Number of routed experts for each token.
        first_k_dense_replace: Number of dense layers at the beginning.
        moe_layer_freq: Divisor of the indices of the other layers that have experts; the rest are dense.
        norm_topk_prob: Whether the probabilities of a token's experts are normalised to a sum of one.
        scoring_func: Scoring function of the router; only `softmax` is implemented.
        aux_loss_alpha: Weight of the load-balancing loss in pre-training, which is not computed here.
        seq_aux: Whether that loss was computed for each sequence. Not used here.

    Raises:
        ValueError: If a value asks for an architecture that is not implemented, or sizes contradict each other.
    """

    model_type = "deepseek"
    # Attributes that the experts modules of transformers read.
    attribute_map: ClassVar[dict[str, str]] = {"num_experts": "n_routed_experts"}

    vocab_size: int = 102400
    hidden_size: int = 2048
    intermediate_size: int = 10944
    moe_intermediate_size: int = 1408
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 16
    max_position_embeddings: int = 4096
    bos_token_id: int | None = 100000
    eos_token_id: int | list[int] | None = 100001
    n_shared_experts: int | None = 2
    n_routed_experts: int = 64
    num_experts_per_tok: int = 6
    first_k_dense_replace: int = 1
    moe_layer_freq: int = 1
    norm_topk_prob: bool = False
    scoring_func: str = "softmax"
    aux_loss_alpha: float | int = 0.001
    seq_aux: bool = True

    def __post_init__(self, **kwargs: object) -> None:
        super().__post_init__(**kwargs)
        for name, least in (
            ("n_routed_experts", 1),
            ("num_experts_per_tok", 1),
            ("first_k_dense_replace", 0),
            ("moe_layer_freq", 1),
        ):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"{name} of a DeepSeekMoE model must be {least} or more, got {value}")
        if self.num_experts_per_tok > self.n_routed_experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} is more than there are experts to choose from, "
                f"n_routed_experts={self.n_routed_experts}"
            )
        rope_type = (self.rope_parameters or {}).get("rope_type", "default")
        for name, value, supported in (
            ("scoring_func", self.scoring_func, ("softmax",)),
            ("a rope_scaling of type", rope_type, ("default", "linear")),
            ("mlp_bias", self.mlp_bias, (False,)),
        ):
            if value not in supported:
                raise ValueError(
                    f"the configuration of this DeepSeekMoE model asks for {name} {value!r}; implemented is "
                    f"{' or '.join(map(repr, supported))}"
                )

    def is_sparse(self, layer: int) -> bool:
        """Whether the layer of this index, from 0, has experts."""
        return layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0


class DeepseekRouter(nn.Module):
    """Top-k router: softmax over all routed experts."""

    def __init__(self, config: DeepseekMoeConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.normalised = config.norm_topk_prob and self.top_k > 1
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Route tokens `[N, d]`: router logits `[N, E]`, probabilities and indices of the chosen experts `[N, k]`."""
        logits = nn.functional.linear(hidden_states, self.weight)
        # In bfloat16 many probabilities would be equal, and the choice between them arbitrary.
        probabilities = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        weights, index = probabilities.topk(self.top_k, dim=-1)
        if self.normalised:
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights.to(hidden_states.dtype), index


# The decorator is on the parent already, but transformers lets a model change its experts implementation only if it is
# in the file of the model's class.
@use_experts_implementation
class DeepseekExperts(Qwen2MoeExperts):
    """The routed experts of one layer: `gate_up_proj [E, 2 d_expert, d]` and `down_proj [E, d, d_expert]`."""


class DeepseekMixture(nn.Module):
    """Routed experts weighted by their probabilities, plus the shared experts."""

    def __init__(self, config: DeepseekMoeConfig) -> None:
        super().__init__()
        self.gate = DeepseekRouter(config)
        self.experts = DeepseekExperts(config)
        self.shared_experts = (
            Qwen2MoeMLP(config, intermediate_size=config.moe_intermediate_size * config.n_shared_experts)
            if config.n_shared_experts
            else None
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map `[B, T, d]` to `[B, T, d]`."""
        tokens = hidden_states.flatten(0, -2)
        _, weights, index = self.gate(tokens)
        output = self.experts(tokens, index, weights).view_as(hidden_states)
        return output if self.shared_experts is None else output + self.shared_experts(hidden_states)


class DeepseekDecoderLayer(LlamaDecoderLayer):
    """Llama's decoder layer, with a mixture of experts as its MLP in the sparse layers."""

    def __init__(self, config: DeepseekMoeConfig, layer_idx: int) -> None:
        # Skips LlamaDecoderLayer.__init__, which would build a dense MLP for every layer.
        GradientCheckpointingLayer.__init__(self)
        self.hidden_size = config.hidden_size
        self.self_attn = LlamaAttention(config, layer_idx)
        self.mlp = DeepseekMixture(config) if config.is_sparse(layer_idx) else LlamaMLP(config)  # type: ignore[assignment]
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class DeepseekPreTrainedModel(LlamaPreTrainedModel):
    """Base class of the models of this family."""

    config: DeepseekMoeConfig
    config_class = DeepseekMoeConfig
    _no_split_modules = ["DeepseekDecoderLayer"]  # noqa: RUF012
    _can_record_outputs = {"hidden_states": DeepseekDecoderLayer, "attentions": LlamaAttention}  # noqa: RUF012
    # transformers stores its answer on the class it asks about, so a Llama model would answer for this subclass.
    _can_set_experts_implementation_cached_value = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DeepseekRouter | DeepseekExperts):
            for parameter in module.parameters(recurse=False):
                init.normal_(parameter, mean=0.0, std=self.config.initializer_range)


class DeepseekModel(DeepseekPreTrainedModel, LlamaModel):
    """The decoder without a head. Called like `LlamaModel`."""

    def __init__(self, config: DeepseekMoeConfig) -> None:
        # Skips LlamaModel.__init__, which would build Llama's layers.
        PreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(DeepseekDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()


class DeepseekForCausalLM(DeepseekPreTrainedModel, LlamaForCausalLM):
    """The causal language model. Called like `LlamaForCausalLM`, without router logits and load-balancing loss.

    The name is that in published configurations, so that saved ones name the same architecture.
    """

    def __init__(self, config: DeepseekMoeConfig) -> None:
        # Skips LlamaForCausalLM.__init__, which would build Llama.
        PreTrainedModel.__init__(self, config)
        self.model = DeepseekModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


def register_deepseek_moe() -> None:
    """Register the family with the Auto classes of transformers, and the conversion of its published checkpoints.

    Published checkpoints have one matrix for each expert (`mlp.experts.7.down_proj.weight`), which are stacked when
    loaded and unstacked when saved. If the model type `deepseek` is registered already, by transformers or by the user,
    nothing is changed. Remote code is never run, even if config.json names some.
    """
    model_type = DeepseekMoeConfig.model_type
    if model_type in CONFIG_MAPPING:
        return
    # The class of the experts is that of Qwen2-MoE, so names and stacked layout are the same.
    register_checkpoint_conversion_mapping(model_type, get_checkpoint_conversion_mapping("qwen2_moe"))
    AutoConfig.register(model_type, DeepseekMoeConfig)
    AutoModel.register(DeepseekMoeConfig, DeepseekModel)
    AutoModelForCausalLM.register(DeepseekMoeConfig, DeepseekForCausalLM)
