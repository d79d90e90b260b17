"""The Qwen2-MoE configuration of an upcycled model, and the refusal of what it could not represent exactly."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedConfig, Qwen2MoeConfig, Qwen2MoeForCausalLM

from bmoe_lightning.utils.messages import first_names
from recipes.upcycle.settings import UpcycleSettings

FAMILIES = ("llama", "mistral", "qwen2")
"""Model types whose layers are those of Qwen2-MoE but for the MLP and biases."""

MLP = re.compile(r"model\.layers\.(?P<layer>\d+)\.mlp\.(?P<matrix>gate_proj|up_proj|down_proj)\.weight")
QKV_BIAS = re.compile(r"model\.layers\.\d+\.self_attn\.[qkv]_proj\.bias")
_EXPERTS = re.compile(r"model\.layers\.\d+\.mlp\.(experts|gate|shared_expert|shared_expert_gate)\b.*")

_SHARED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "tie_word_embeddings",
    "attention_dropout", "pad_token_id", "bos_token_id", "eos_token_id",
)  # fmt: skip


class CannotUpcycleError(ValueError):
    """A model has no exact mixture of experts in the layout of Qwen2-MoE; the message is one line for the user."""


def upcycled_layers(layers: str, num_layers: int) -> range:
    """Indices of the layers that are upcycled.

    Args:
        layers: `all`, `upper-half`, or the number of uppermost layers.
        num_layers: Number of layers of the model.

    Raises:
        CannotUpcycleError: If the model has fewer layers.
    """
    count = {"all": num_layers, "upper-half": (num_layers + 1) // 2}.get(layers)
    count = int(layers) if count is None else count
    if count > num_layers:
        raise CannotUpcycleError(f"the model has {num_layers} layers; give --layers {num_layers} at most, or all")
    return range(num_layers - count, num_layers)


def moe_config(dense: PreTrainedConfig, settings: UpcycleSettings) -> Qwen2MoeConfig:
    """The configuration of the mixture of experts.

    The routing weights of the chosen experts sum to one, and the shared expert, which the layout has in any case, has
    width 1, for weights that are all zero: neither changes what copies of the dense MLP compute.

    Args:
        dense: Configuration of the dense model.
        settings: Numbers of experts and layers.

    Raises:
        CannotUpcycleError: If the model is of another family, quantised, has an attention window, or cannot be split or
            upcycled as the settings ask.
    """
    if dense.model_type not in FAMILIES:
        raise CannotUpcycleError(
            f"a model of type {dense.model_type!r} cannot be upcycled exactly; those of type {', '.join(FAMILIES)} can"
        )
    if settings.gguf_file is None and getattr(dense, "quantization_config", None):
        raise CannotUpcycleError("its weights are quantised; give the model that it was quantised from")
    window = getattr(dense, "sliding_window", None)
    if window and window < dense.max_position_embeddings:
        raise CannotUpcycleError(
            f"its attention has a window of {window} tokens, which Qwen2-MoE does not hand to every implementation of "
            f"attention; if your texts are shorter, set sliding_window to null in a copy of its config.json"
        )
    if dense.intermediate_size % settings.segments:
        raise CannotUpcycleError(
            f"its MLP is {dense.intermediate_size} wide, which --segments {settings.segments} does not divide"
        )
    layers = upcycled_layers(settings.layers, dense.num_hidden_layers)
    shared = {name: getattr(dense, name) for name in _SHARED}
    head_dim = getattr(dense, "head_dim", None)
    if head_dim and head_dim * dense.num_attention_heads != dense.hidden_size:
        shared["head_dim"] = head_dim  # no field of Qwen2-MoE, but its attention reads it
    return Qwen2MoeConfig(
        **shared,
        rope_parameters=copy.deepcopy(dense.rope_parameters),
        qkv_bias=True,  # as in the published models, and what readers that do not know this field assume
        use_sliding_window=False,
        num_experts=settings.experts * settings.segments,
        num_experts_per_tok=settings.top_k * settings.segments,
        norm_topk_prob=True,
        moe_intermediate_size=dense.intermediate_size // settings.segments,
        shared_expert_intermediate_size=1,  # with 0, not every reader of the layout expects its (empty) tensors
        decoder_sparse_step=1,
        mlp_only_layers=[layer for layer in range(dense.num_hidden_layers) if layer not in layers],
        architectures=[Qwen2MoeForCausalLM.__name__],
    )


def empty_model(config: Qwen2MoeConfig) -> Qwen2MoeForCausalLM:
    """A model without memory for its weights (on the meta device)."""
    with torch.device("meta"):
        return Qwen2MoeForCausalLM(config)


def dense_tensors(state: Mapping[str, Tensor], moe: Qwen2MoeForCausalLM) -> dict[str, Tensor]:
    """The tensors of a dense model that go into its mixture of experts, MLPs among them.

    Args:
        state: State dict of the dense model.
        moe: Mixture of experts, without weights.

    Returns:
        The tensors without biases that are zero, and without an output matrix that is tied to the embeddings.

    Raises:
        CannotUpcycleError: If one has no place in the mixture of experts and is not zero, or has another shape than
            there, or if one is missing, not floating-point or not finite.
    """
    places = {name: tensor.shape for name, tensor in moe.state_dict().items() if not _EXPERTS.fullmatch(name)}
    surplus = {name for name in state if name not in places and not MLP.fullmatch(name)}
    found = {name: tensor for name, tensor in state.items() if name not in surplus}
    if moe.config.tie_word_embeddings:
        found.pop("lm_head.weight", None)
        places.pop("lm_head.weight", None)
    wrong = [
        *(name for name in surplus if bool(state[name].count_nonzero())),
        *(name for name in places if name not in found and not QKV_BIAS.fullmatch(name)),
        *(name for name, tensor in found.items() if tensor.shape != places.get(name, tensor.shape)),
    ]
    if wrong:
        raise CannotUpcycleError(
            f"Qwen2-MoE has no exact place for some of its weights, or it lacks some: {first_names(wrong)}. Biases of "
            "the MLP and of the attention's output have none, unless they are zero"
        )
    unusable = [name for name, tensor in found.items() if not _is_usable(tensor)]
    if unusable:
        raise CannotUpcycleError(
            f"some of its weights are quantised, infinite or not a number: {first_names(unusable)}. Give another "
            "--dtype, or a model that is not quantised"
        )
    return found


def _is_usable(tensor: Tensor) -> bool:
    # The sum is finite only if all are, and takes no memory; extreme values that overflow it are no weights of a model.
    return tensor.is_floating_point() and bool(tensor.sum(dtype=torch.float64).isfinite())
