"""The sizes of a model's blocks, attention and experts, read from a model on the meta device."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

from bmoe_lightning.experts import ExpertLayer, down_proj_parameters, expert_parameters, find_expert_layers
from bmoe_lightning.experts.fingerprint import sample
from bmoe_lightning.experts.weight_record import WeightRecord
from bmoe_lightning.models import register_models
from bmoe_lightning.models.loading import HUB_ID, ModelUnavailableError

CONFIGS = Path(__file__).parent / "configs"
_TOP_K_NAMES = (
    "top_k", "num_experts_per_tok", "num_experts_per_token", "experts_per_token", "num_selected_experts", "moe_topk",
    "moe_top_k", "moe_k", "top_k_experts",
)  # fmt: skip


@dataclass(frozen=True)
class Products:
    """The matrix products that a layout of experts computes for all experts at once.

    Attributes:
        first: Whether the first matrices share a product.
        second: Whether `down_proj` shares a product.
    """

    first: bool
    second: bool


# With one module for each expert, products and gradients are separate for each expert.
_PRODUCTS = {
    "fused": Products(first=True, second=True),
    "adapted": Products(first=False, second=True),
    "modules": Products(first=False, second=False),
}


@dataclass(frozen=True)
class Experts:
    """The experts of one MoE layer.

    Attributes:
        layer: Expert layer as found in the model.
        top_k: Number of experts that a token is routed to.
        parameters: Number of parameters of all experts, biases included.
        matrices: Number of weights of one expert's matrices.
        second: Number of weights of one expert's `down_proj`.
        all_tensors: Number of parameter tensors of all experts.
        second_tensors: Number of parameter tensors that hold `down_proj`.
    """

    layer: ExpertLayer
    top_k: int
    parameters: int
    matrices: int
    second: int
    all_tensors: int
    second_tensors: int

    @property
    def products(self) -> Products:
        """The products that are computed for all experts at once."""
        return _PRODUCTS[self.layer.layout]

    @property
    def share(self) -> float:
        """Share of the experts that a token is routed to."""
        return self.top_k / self.layer.num_experts

    @property
    def first_width(self) -> int:
        """Output width of the first matrices of an expert: two times `d_in` with a gate, `d_in` without."""
        return (self.matrices - self.second) // self.layer.d_out

    @property
    def gated(self) -> bool:
        """Whether the first matrices are a gate and an up projection."""
        return self.first_width > self.layer.d_in


@dataclass(frozen=True)
class Block:
    """One layer of the decoder.

    Attributes:
        matrices: Shape `(out, in)` of every matrix that all tokens pass through: attention, routers, shared experts.
        norms: Number of normalisation layers.
        attention: Whether every token attends to all others (not so in linear attention or state space models).
        experts: Experts of the layer; empty in a dense one.
    """

    matrices: tuple[tuple[int, int], ...]
    norms: int
    attention: bool
    experts: tuple[Experts, ...]

    @property
    def weights(self) -> int:
        """Number of weights that every token passes through."""
        return sum(out * into for out, into in self.matrices)


@dataclass(frozen=True)
class Architecture:
    """The sizes of a model that a plan needs.

    Attributes:
        name: Class of the model.
        model_type: `model_type` of its configuration.
        dtype: Dtype of the experts' weights.
        parameters: Number of all parameters.
        weight_bytes: Bytes of all parameters.
        hidden: Width of the model.
        vocabulary: Number of rows of the head.
        attention_width: Width of queries and values together, over all heads.
        one_position: Whether the head can be applied to the last position of each row alone.
        blocks: Layers of the decoder.
        outside: Shapes of matrices outside of the blocks, except head and embedding.
        record_bytes: Bytes of the sampled weights in a posterior's file.
    """

    name: str
    model_type: str
    dtype: torch.dtype
    parameters: int
    weight_bytes: int
    hidden: int
    vocabulary: int
    attention_width: int
    one_position: bool
    blocks: tuple[Block, ...]
    outside: tuple[tuple[int, int], ...]
    record_bytes: int

    @property
    def experts(self) -> tuple[Experts, ...]:
        """The experts of all layers, in order."""
        return tuple(experts for block in self.blocks for experts in block.experts)

    @property
    def first(self) -> int:
        """Index of the first block with experts, where backward passes end."""
        return next(i for i, block in enumerate(self.blocks) if block.experts)

    @property
    def routed(self) -> int:
        """Number of parameters of all routed experts."""
        return sum(experts.parameters for experts in self.experts)

    @property
    def second(self) -> int:
        """Number of weights of all second matrices."""
        return sum(experts.second * experts.layer.num_experts for experts in self.experts)

    @property
    def active(self) -> int:
        """Number of parameters that are active for a token, embedding and head included."""
        return self.parameters - self.routed + round(sum(e.parameters * e.share for e in self.experts))


def known_names() -> list[str]:
    """Names of the models whose configuration is in this package."""
    return sorted(path.stem for path in CONFIGS.glob("*.json"))


def load_configuration(source: str) -> PreTrainedConfig:
    """Load a model's configuration. Remote code is never run.

    Args:
        source: Configuration file, a folder with a `config.json`, one of `known_names()` or a hub id.

    Raises:
        ModelUnavailableError: If it is not found, is no configuration, or its model type is unknown to transformers.
    """
    register_models()
    path = CONFIGS / f"{source}.json" if source in known_names() else Path(source)
    local = path.exists()
    if not local and not HUB_ID.fullmatch(source):
        raise ModelUnavailableError(
            f"there is no file or folder {source!r}, and it is neither a hub id, which is owner/name, nor one of "
            f"{', '.join(known_names())}"
        )
    try:
        return AutoConfig.from_pretrained(str(path) if local else source, trust_remote_code=False)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise ModelUnavailableError(
            f"the configuration {source!r} could not be loaded ({_reason(error)}); "
            + (
                "it must be the config.json of a model that the installed transformers or bmoe_lightning knows"
                if local
                else f"a config.json file works without the hub, and so does one of {', '.join(known_names())}"
            )
        ) from None


def build(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Build a causal language model on the meta device: shapes alone, no weights.

    Args:
        config: Configuration of the model; of a multimodal one, its text model is built where it has one.
        dtype: Dtype of the weights.

    Raises:
        ModelUnavailableError: If there is no causal language model for the configuration.
    """
    failures: list[Exception] = []
    text = config.get_text_config(decoder=True)
    candidates = [(AutoModelForCausalLM, config), (AutoModelForCausalLM, text), (AutoModelForImageTextToText, config)]
    for kind, candidate in candidates if text is not config else candidates[:1]:
        try:
            with torch.device("meta"):
                model = kind.from_config(candidate, dtype=dtype, trust_remote_code=False)
        # The constructor of a model may raise any of these for an inconsistent configuration.
        except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, ImportError) as error:
            failures.append(error)
        else:
            assert isinstance(model, PreTrainedModel)
            return model
    raise ModelUnavailableError(
        f"no causal language model can be built from this configuration of type {config.model_type!r} "
        f"({_reason(failures[0])})"
    )


def describe(model: PreTrainedModel, experts_per_token: int | None = None) -> Architecture:
    """Read the sizes that a plan needs from a model.

    Args:
        model: Model on any device.
        experts_per_token: Number of experts that a token is routed to, where neither routers nor configuration have it.

    Raises:
        ValueError: If the model has no experts, or it is unknown to how many a token is routed.
    """
    layers = find_expert_layers(model)
    config = model.config.get_text_config(decoder=True)
    stack_name = _stack(model, layers[0].name)
    stack = model.get_submodule(stack_name)
    experts: dict[int, list[Experts]] = {}
    for layer in layers:
        place = int(layer.name.removeprefix(f"{stack_name}.").split(".")[0])
        experts.setdefault(place, []).append(_experts(model, layer, config, experts_per_token))
    head: Any = model.get_output_embeddings()
    vocabulary, hidden = head.weight.shape
    in_experts = {id(p) for layer in layers for p in expert_parameters(model, layer).values()}
    elsewhere = in_experts | {id(head.weight)} | {id(p) for p in stack.parameters()}
    return Architecture(
        name=type(model).__name__,
        model_type=model.config.model_type,
        dtype=next(p.dtype for p in expert_parameters(model, layers[0]).values()),
        parameters=sum(p.numel() for p in model.parameters()),
        weight_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
        hidden=hidden,
        vocabulary=vocabulary,
        attention_width=_attention_width(config),
        one_position="logits_to_keep" in inspect.signature(model.forward).parameters,
        blocks=tuple(_block(block, tuple(experts.get(i, ())), in_experts) for i, block in enumerate(stack.children())),
        outside=tuple(_matrices(model.get_decoder(), elsewhere)),
        record_bytes=_record_bytes(model, layers),
    )


def _record_bytes(model: nn.Module, layers: Sequence[ExpertLayer]) -> int:
    parameters = dict(model.named_parameters())
    samples = {
        name: torch.zeros(sample(p.detach().to("meta"), sharded=False).numel()) for name, p in parameters.items()
    }
    record = WeightRecord(
        tuple(layer.name for layer in layers), samples, {name: p.dtype for name, p in parameters.items()}
    )
    return sum(tensor.nbytes for tensor in record.tensors().values())


def _stack(model: nn.Module, name: str) -> str:
    """The name of the list of decoder layers that contains an expert layer."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        prefix = ".".join(parts[:end])
        if isinstance(model.get_submodule(prefix), nn.ModuleList):
            return prefix
    raise ValueError(f"the experts {name!r} are in no nn.ModuleList of decoder layers; such a model cannot be planned")


def _experts(model: nn.Module, layer: ExpertLayer, config: Any, experts_per_token: int | None) -> Experts:
    parameters = expert_parameters(model, layer)
    matrices = sum(p.numel() for name, p in parameters.items() if p.dim() > 1 and "bias" not in name)
    return Experts(
        layer=layer,
        top_k=experts_per_token or _top_k(model, layer, config),
        parameters=sum(p.numel() for p in parameters.values()),
        matrices=matrices // layer.num_experts,
        second=layer.d_in * layer.d_out,
        all_tensors=len(parameters),
        second_tensors=len(down_proj_parameters(model, layer)),
    )


def _top_k(model: nn.Module, layer: ExpertLayer, config: Any) -> int:
    """Number of experts that a token is routed to, from the router next to the experts or from the configuration."""
    beside = model.get_submodule(layer.name.rpartition(".")[0])
    sources = [*(module for name, module in beside.named_modules() if name.count(".") < 2), config]
    for source in sources:
        for name in _TOP_K_NAMES:
            value = getattr(source, name, None)
            # Some configurations have one number for each layer; layers with equal experts have equal numbers.
            value = value[0] if isinstance(value, (list, tuple)) and value else value
            if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= layer.num_experts:
                return value
    raise ValueError(
        f"neither the router nor the configuration names the number of experts of {layer.name!r} for each token; "
        "give --experts-per-token"
    )


def _matrices(module: nn.Module, left_out: set[int]) -> Iterator[tuple[int, int]]:
    """Shapes `(out, in)` of the matrices that tokens are multiplied with; embeddings are lookups and not included."""
    for part in module.modules():
        if isinstance(part, nn.Embedding):
            continue
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.dim() == 2 and "bias" not in name and id(parameter) not in left_out:
                yield parameter.shape[0], parameter.shape[1]


def _block(block: nn.Module, experts: tuple[Experts, ...], in_experts: set[int]) -> Block:
    kinds = [type(module).__name__ for module in block.modules()]
    return Block(
        matrices=tuple(_matrices(block, in_experts)),
        norms=sum("Norm" in kind for kind in kinds),
        attention=any(
            kind.endswith("Attention") and "Linear" not in kind and "Lightning" not in kind for kind in kinds
        ),
        experts=experts,
    )


def _attention_width(config: Any) -> int:
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    query = (getattr(config, "qk_nope_head_dim", None) or 0) + (getattr(config, "qk_rope_head_dim", None) or 0)
    return heads * ((query or width) + (getattr(config, "v_head_dim", None) or width))


def _reason(error: Exception) -> str:
    text = str(error)
    if "custom code" in text or "trust_remote_code" in text:
        return "it names remote code, which is never run, and an unknown model type"
    if isinstance(error, StrictDataclassError):
        return " ".join(text.split()).rstrip(".")
    return text.splitlines()[0].rstrip(".:") if text else type(error).__name__
