"""Loading of language models and tokenizers by folder or hub id: complete or refused, and without remote code."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from bmoe_lightning.models import register_models
from bmoe_lightning.utils.late_import import how_to_install
from bmoe_lightning.utils.messages import first_line, first_names

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]

# The owner's name may be missing, as with the hub's oldest models.
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")

# How the two kinds of vocabulary write a space.
_BYTE_LEVEL_SPACE, _LLAMA_SPACE = "\u0120", "\u2581"


class ModelUnavailableError(RuntimeError):
    """A model, named by its folder or hub id, could not be loaded completely."""


class MissingPackageError(ImportError):
    """A package that a model's file format needs is not installed."""


@contextmanager
def model_source(source: str, *errors: type[Exception]) -> Iterator[None]:
    """Convert errors from reading the files of a model to a `ModelUnavailableError` of one sentence.

    Args:
        source: Local folder or hub id; anything else is refused before the files are read.
        errors: Exceptions to convert, in addition to those for missing or damaged files.

    Raises:
        ModelUnavailableError: If there is no such folder, the hub does not have the model or cannot be reached, or
            files are missing or damaged.
    """
    folder = Path(source).is_dir()
    if not folder and not HUB_ID.fullmatch(source):
        raise ModelUnavailableError(f"there is no folder {source!r}, and it is no hub id, which reads owner/name")
    expected: tuple[type[Exception], ...] = (OSError, SafetensorError, *errors)
    try:
        yield
    except expected as error:
        remedy = (
            "are all its files there and complete?" if folder else "the path of a local folder works without the hub."
        )
        message = f"the model {source!r} could not be loaded ({first_line(error)}); {remedy}"
        raise ModelUnavailableError(message) from None


def load_causal_model(source: str, dtype: DtypeName = "auto", *, gguf_file: str | None = None) -> PreTrainedModel:
    """Load a causal language model on the CPU, in evaluation mode. Remote code is never run.

    Families of `bmoe_lightning.models` load like those of transformers, even if config.json names remote code.
    Unexpected tensors in the files are ignored, with a warning that names them.

    Args:
        source: Local folder or hub id.
        dtype: Dtype of the weights; `auto` is that of the files.
        gguf_file: Name of a GGUF file in the folder or repository, whose weights are dequantised.

    Raises:
        MissingPackageError: If packages that read GGUF files are missing.
        ModelUnavailableError: If there is no such folder, the hub does not have the model, files are missing or
            damaged, or they lack weights of the model (a single expert, say) or hold them in other shapes, which
            transformers would initialise at random.
        ValueError: If the model type is unknown to transformers, or the configuration asks for an architecture that is
            not implemented.
    """
    register_models()
    check_gguf_packages(gguf_file)
    try:
        # The trainer's device context would make transformers ask for accelerate; the strategy moves the model later.
        with model_source(source), torch.device("cpu"):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=dtype,
                trust_remote_code=False,
                output_loading_info=True,
                # So that the report names them; `_check_complete` refuses them.
                ignore_mismatched_sizes=True,
                **_gguf_options(gguf_file),
            )
    except StrictDataclassError as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(f"the configuration of {source!r} does not describe a model ({reason})") from None
    except RuntimeError as error:
        if "conversion of the weights" not in str(error):
            raise
        raise ModelUnavailableError(
            f"the experts in the files of {source!r} cannot be stacked: some layer lacks a matrix of an expert, or has "
            "one of another shape (transformers' report above names the layer). Is the download complete?"
        ) from None
    model, report = loaded
    _check_complete(source, model, report)
    return model


def check_gguf_packages(gguf_file: str | None) -> None:
    """Check that a GGUF file, if there is one, could be read.

    Raises:
        MissingPackageError: If packages that transformers needs for it are missing.
    """
    missing = [name for name in ("accelerate", "gguf") if gguf_file is not None and find_spec(name) is None]
    if missing:
        raise MissingPackageError(
            f"transformers reads the GGUF file {gguf_file!r} with {' and '.join(missing)}, which cannot be imported; "
            f"{how_to_install('gguf')}"
        )


def _gguf_options(gguf_file: str | None) -> dict[str, Any]:
    return {} if gguf_file is None else {"gguf_file": gguf_file}


def load_tokenizer(source: str, *, gguf_file: str | None = None) -> PreTrainedTokenizerBase:
    """Load a tokenizer as its files describe it. Remote code is never run, without a prompt that asks to.

    Args:
        source: Local folder or hub id.
        gguf_file: Name of a GGUF file in the folder or repository that holds the tokenizer.

    Raises:
        MissingPackageError: If packages that read GGUF files are missing.
        OSError: If the tokenizer could not be loaded.
        ValueError: If it needs remote code.
    """
    register_models()
    check_gguf_packages(gguf_file)
    options = _gguf_options(gguf_file)
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **options)
    # DeepSeek's tokenizers name Llama's class but are byte-level. Transformers before 5.22 used that class, which
    # replaces the pre-tokenizer of tokenizer.json by Llama's: every space of a prompt is lost.
    vocabulary = tokenizer.get_vocab()
    if isinstance(tokenizer, LlamaTokenizer) and _BYTE_LEVEL_SPACE in vocabulary and _LLAMA_SPACE not in vocabulary:
        return PreTrainedTokenizerFast.from_pretrained(source, trust_remote_code=False, **options)
    return tokenizer


def _check_complete(source: str, model: PreTrainedModel, report: Mapping[str, Any]) -> None:
    """Refuse weights that are missing or have other shapes; warn of surplus ones."""
    shapes = [
        f"{name} (shape {list(found)} in the files, {list(expected)} in the model)"
        for name, found, expected in report["mismatched_keys"]
    ]
    broken = sorted({*report["missing_keys"], *shapes})
    if broken:
        raise ModelUnavailableError(
            f"the files of {source!r} do not hold all weights of {type(model).__name__}, which would stay random: "
            f"{first_names(broken)}. Is the download complete, and is it a causal language model?"
        )
    surplus = report["unexpected_keys"]
    if surplus:
        warnings.warn(
            f"{type(model).__name__} has no place for {len(surplus)} of the tensors in the files of {source!r}, which "
            f"are ignored: {first_names(surplus)}. If the model should use them, config.json does not fit the weights.",
            stacklevel=3,
        )
