"""The files of a model, beside its weights, that predictions depend on: its configuration, and those of its tokenizer.

`generation_config.json` and templates of chats are none of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from transformers import PreTrainedTokenizerBase

from bmoe_lightning.models.loading import model_source
from bmoe_lightning.utils.file_digest import digest_of

CONFIG_FILES = ("config.json",)

_TOKENIZER_CONFIG = "tokenizer_config.json"
_VERSIONED = "fast_tokenizer_files"

TOKENIZER_FILES = (
    *CONFIG_FILES,  # its model type may choose the class of the tokenizer
    "tokenizer.json",
    _TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    # Of a tokenizer without tokenizer.json.
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tiktoken.model",
    "tekken.json",
)


def tokenizer_files(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Names of the files that a tokenizer may have been read from.

    Args:
        tokenizer: The tokenizer.
    """
    return tuple(dict.fromkeys((*TOKENIZER_FILES, *tokenizer.vocab_files_names.values())))


def file_of(source: str, name: str) -> Path | None:
    """A file of a model where transformers reads it: in its folder, or in the cache of the hub, updated if it can be.

    Args:
        source: Local folder or hub id.
        name: Name of the file.

    Returns:
        Its path; None if the model has no such file, or the cache has none and the hub cannot be reached.

    Raises:
        ModelUnavailableError: If there is no such folder, or the hub does not have the model.
    """
    if Path(source).is_dir():
        path = Path(source) / name
        return path if path.is_file() else None
    with model_source(source):
        try:
            return Path(hf_hub_download(source, name))
        except EntryNotFoundError:
            return None


def with_versions(source: str, names: Iterable[str]) -> tuple[str, ...]:
    """Names of files, and those of the files that tokenizer_config.json, if it is one of them, names.

    transformers reads one of these in place of tokenizer.json; which one depends on its version.

    Args:
        source: Local folder or hub id.
        names: Names of files.

    Raises:
        ModelUnavailableError: As `file_of`.
        OSError: If tokenizer_config.json cannot be read.
    """
    names = tuple(names)
    path = file_of(source, _TOKENIZER_CONFIG) if _TOKENIZER_CONFIG in names else None
    try:
        content = {} if path is None else json.loads(path.read_bytes())
    except ValueError:  # said where the tokenizer is loaded
        content = {}
    versions = content.get(_VERSIONED) if isinstance(content, dict) else None
    more = versions if isinstance(versions, list) else []
    return tuple(dict.fromkeys((*names, *(name for name in more if isinstance(name, str)))))


def file_digests(source: str, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 digests of those files that a model has, by name.

    Args:
        source: Local folder or hub id.
        names: Names of files; see `with_versions`.

    Raises:
        ModelUnavailableError: As `file_of`.
        OSError: If a file cannot be read.
    """
    found = {name: file_of(source, name) for name in with_versions(source, names)}
    return {name: digest_of(path) for name, path in found.items() if path is not None}
