"""A tiny model of any MoE family, with random weights, built from the family's configuration class.

Every size is replaced by a small one, on every level of a nested configuration (`text_config`, `vision_config`, ...);
further settings of single families are in `overrides.py`.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from recipes.supported_models.catalogue import families, is_own, module_of, uses_interface
from recipes.supported_models.overrides import SMALL, SMALL_TOWER, VOCABULARY, FamilySettings, settings_of

NUM_CLASSES = 3
_FIRST_ANSWER = 3
_SPECIAL_TOKENS = 10
_WEIGHT_STD = 0.3
# Heads that a user would fine-tune, in order of preference.
_HEADS = ("ForCausalLM", "ForConditionalGeneration", "ForTokenClassification")

# Nested configurations of language models; all others are vision or audio towers.
_LANGUAGE = ("text", "thinker", "talker", "code_predictor", "decoder")

Batch = dict[str, Tensor]


class CannotBuildError(RuntimeError):
    """A family has no tiny model. The message is the reason, one short sentence for a table."""


@dataclass(frozen=True)
class TinyFamily:
    """A family's tiny model with input batches.

    Attributes:
        family: Name from `families()`.
        model: Model with random weights in evaluation mode, in `model.dtype` (float64 where the family supports it),
            with eager experts. Only the weights are in float64: the families' code computes norms, and sometimes the
            logits, in float32.
        class_logits: Function `(model, batch) -> (logits [B, 3], labels [B])`, at the last position of every example.
        batches: Batches of three and of two examples, each a dictionary of the forward's inputs and `labels` `[B]`;
            the second is padded on the left, unless the family does not support padding.
        wrapper: Whether the model has towers for images, video or audio besides its language model; batches are text.
    """

    family: str
    model: PreTrainedModel
    class_logits: Callable[[PreTrainedModel, Batch], tuple[Tensor, Tensor]]
    batches: tuple[Batch, ...]
    wrapper: bool = False


def build(family: str, *, wrapper: bool = False, seed: int = 0) -> TinyFamily:
    """Build the tiny model of a family.

    Args:
        family: Name from `families()`.
        wrapper: Whether to build the multimodal wrapper of a family that also has a text model alone.
        seed: Seed of weights and input; the global generator is restored.

    Raises:
        ValueError: If it is no MoE family, or has no wrapper around its text model.
        CannotBuildError: If the family has no tiny model, with the reason.
    """
    if family not in families():
        raise ValueError(f"{family!r} is no MoE family of the installed transformers or this library; see families()")
    settings = settings_of(family)
    if settings.refused is not None:
        raise CannotBuildError(settings.refused)
    model_class = _model_class(family, settings)
    if wrapper:
        name = wrapper_name(family)
        if name is None:
            raise ValueError(f"{family!r} has no multimodal wrapper beside {model_class.__name__}")
        model_class = getattr(importlib.import_module(module_of(family)), name)
        settings = dataclasses.replace(settings, config={**settings.wrapper, "text_config": settings.config})
    generator = torch.Generator().manual_seed(seed)
    try:
        model = _random_model(model_class, settings, generator, interface=uses_interface(family))
        batches = _batches(settings, generator)
        tiny = TinyFamily(family, model, _ClassLogits(settings), batches, _has_towers(model_class))
        _try_out(tiny)
    except Exception as error:
        raise CannotBuildError(f"no small configuration is known: {_in_one_line(error)}") from error
    return tiny


def wrapper_name(family: str) -> str | None:
    """The class of a family's multimodal wrapper, where its tiny model is a text model alone; None if there is none."""
    usual = _model_class(family, settings_of(family))
    if _has_towers(usual):
        return None
    module = importlib.import_module(module_of(family))
    names = [name for name in _heads(family) if name.endswith("ForConditionalGeneration")]
    return next((name for name in names if _has_towers(getattr(module, name))), None)


def _has_towers(model_class: type[PreTrainedModel]) -> bool:
    """Whether a model's configuration contains that of a language model and others."""
    languages = [_is_language(name) for name in _config_class(model_class).sub_configs]
    return any(languages) and not all(languages)


def _config_class(model_class: type[PreTrainedModel]) -> type[PreTrainedConfig]:
    config_class = model_class.config_class
    if config_class is None:
        raise TypeError(f"{model_class.__name__} names no configuration class")
    return config_class


def _random_model(
    model_class: type[PreTrainedModel], settings: FamilySettings, generator: torch.Generator, *, interface: bool
) -> PreTrainedModel:
    config_class = _config_class(model_class)
    config = config_class(**_settings_for(config_class, settings.config))
    if interface:
        config._experts_implementation = "eager"
    # Constructors draw parameters, which are replaced, and sometimes buffers from the global generator.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator.initial_seed())
        model = model_class(config)
    nn.Module.to(model, settings.dtype)
    model.eval()
    _fill(model, generator)
    return model


def _try_out(tiny: TinyFamily) -> None:
    with torch.no_grad():
        for batch in tiny.batches:
            logits, _ = tiny.class_logits(tiny.model, batch)
            if not bool(logits.isfinite().all()):
                raise RuntimeError("its logits are not finite")


def _model_class(family: str, settings: FamilySettings) -> type[PreTrainedModel]:
    module = importlib.import_module(module_of(family))
    if settings.model_class is not None:
        return getattr(module, settings.model_class)
    names = _heads(family)
    for head in _HEADS:
        for name in names:
            if name.endswith(head):
                return getattr(module, name)
    raise CannotBuildError("it has no head with class logits")


def _heads(family: str) -> list[str]:
    """Names of a family's model classes, heads among them."""
    module = importlib.import_module(module_of(family))
    if is_own(family):  # without the classes that it imports
        return [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
    return list(module.__all__)


def _settings_for(
    config_class: type[PreTrainedConfig], overrides: Mapping[str, Any], small: Mapping[str, Any] = SMALL
) -> dict[str, Any]:
    """Keyword arguments that make a configuration small, on every level."""
    names = [field.name for field in dataclasses.fields(config_class)]
    values = {name: small[name] for name in names if name in small}
    special = [name for name in names if name.endswith(("_token_id", "_token_index")) and name not in small]
    values |= {name: VOCABULARY - 1 - index % _SPECIAL_TOKENS for index, name in enumerate(special)}
    nested = {name: inner for name, inner in config_class.sub_configs.items() if hasattr(inner, "__dataclass_fields__")}
    for name, inner in nested.items():
        values[name] = _settings_for(inner, overrides.get(name, {}), SMALL if _is_language(name) else SMALL_TOWER)
    return values | {name: value for name, value in overrides.items() if name not in nested}


def _is_language(name: str) -> bool:
    return any(word in name for word in _LANGUAGE)


def _fill(model: nn.Module, generator: torch.Generator) -> None:
    """Sample every weight, so that none is zero, constant or uninitialised.

    Norms have scales near 1, as in a trained model; the bias that a router adds to its scores is small.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            is_scale = parameter.dim() == 1 and name.endswith(("weight", "scale"))
            parameter.copy_(1 + 0.1 * noise if is_scale else (0.1 if "bias" in name else _WEIGHT_STD) * noise)
        for name, buffer in model.named_buffers():
            if "bias" in name and buffer.is_floating_point():
                # Added to the initial value: a router may mask an expert with a non-zero bias.
                buffer.add_(0.1 * torch.randn(buffer.shape, generator=generator, dtype=torch.float64))
            elif name.endswith("tid2eid"):
                # A table from tokens to experts instead of a router; initially, every token goes to the first one.
                scores = torch.rand(len(buffer), SMALL["num_experts"], generator=generator)
                buffer.copy_(scores.argsort(-1)[:, : buffer.shape[1]])


def _batches(settings: FamilySettings, generator: torch.Generator) -> tuple[Batch, ...]:
    first = _random_batch(3, 6, settings, generator)
    second = _random_batch(2, 5, settings, generator)
    if settings.image_marker is not None:
        # The last token is an image token, or the last layer's image experts would not affect the logits.
        first[settings.image_marker] = torch.tensor([[0, 1, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 0, 1]])
    if settings.takes_padding:
        mask = torch.ones(2, 5, dtype=torch.int64)
        mask[1, :2] = 0
        second["attention_mask"] = mask
        second["input_ids"] = second["input_ids"].masked_fill(mask == 0, SMALL["pad_token_id"])
    return first, second


def _random_batch(size: int, length: int, settings: FamilySettings, generator: torch.Generator) -> Batch:
    batch = {"input_ids": random_tokens((size, length), generator)}
    batch["labels"] = torch.randint(NUM_CLASSES, (size,), generator=generator)
    if settings.is_encoder_decoder:
        batch["decoder_input_ids"] = random_tokens((size, 3), generator)
    return batch


def random_tokens(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Token ids of text, without special tokens."""
    return torch.randint(_FIRST_ANSWER, VOCABULARY - _SPECIAL_TOKENS, shape, generator=generator)


@dataclass(frozen=True)
class _ClassLogits:
    settings: FamilySettings

    def __call__(self, model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits = model(**inputs, **self.settings.call).logits[:, -1]
        start = _FIRST_ANSWER if logits.shape[-1] > NUM_CLASSES else 0
        return logits[:, start : start + NUM_CLASSES], batch["labels"]


def _in_one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
