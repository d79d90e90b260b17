"""The files of a model, beside its weights, that predictions depend on: its configuration, and those of its tokenizer.

`generation_config.json` and templates of chats are none of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from transformers import PreTrainedTokenizerBase

from bmoe_lightning.models.loading import ModelUnavailableError, model_source
from bmoe_lightning.utils.file_digest import digest_of

CONFIG_FILES = ("config.json",)

_TOKENIZER = "tokenizer.json"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_VERSIONED = "fast_tokenizer_files"

TOKENIZER_FILES = (
    *CONFIG_FILES,  # its model type may choose the class of the tokenizer
    _TOKENIZER,
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


class NotCachedError(ModelUnavailableError):
    """The hub cannot be reached and its cache has no such file, so it is not known whether the model has one."""


class FileChange(Enum):
    """How a file of a model is not as it was."""

    CHANGED = "changed"
    ADDED = "added"
    MISSING = "missing"
    NOT_CACHED = "not in the cache of the hub, which cannot be reached"


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
        Its path; None if the model has no such file.

    Raises:
        NotCachedError: If the hub cannot be reached, and the cache has no such file.
        ModelUnavailableError: If there is no such folder, or the hub does not have the model.
    """
    if Path(source).is_dir():
        path = Path(source) / name
        return path if path.is_file() else None
    with model_source(source):
        try:
            return Path(hf_hub_download(source, name))
        except LocalEntryNotFoundError:
            raise NotCachedError(
                f"{name} of the model {source!r} is not in the cache of the hub, which cannot be reached"
            ) from None
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
    return tuple(dict.fromkeys((*names, *(_versions(source) if _TOKENIZER_CONFIG in names else ()))))


def file_digests(source: str, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 digests of those files that a model has, by name, without those that `NotCachedError` is about.

    Args:
        source: Local folder or hub id.
        names: Names of files; see `with_versions`.

    Raises:
        ModelUnavailableError: As `file_of`.
        OSError: If a file cannot be read.
    """
    found = {name: _known_file(source, name) for name in with_versions(source, names)}
    return {name: digest_of(path) for name, path in found.items() if path is not None}


def changed_files(source: str, known: Mapping[str, str], names: Iterable[str]) -> dict[str, FileChange]:
    """The files of a model that are not as they were, by name.

    Of a model of the hub, a file without a digest is not compared: the hub may not have been reached at that time.
    Neither is one that `NotCachedError` is about, unless every tokenizer is read with it.

    Args:
        source: Local folder or hub id.
        known: Digests of the files as they were; see `file_digests`.
        names: Names of further files that may have been added; see `with_versions`.

    Raises:
        ModelUnavailableError: As `file_of`.
        OSError: If a file cannot be read.
    """
    compared = with_versions(source, (*known, *names))
    found = {name: _change(source, name, known.get(name)) for name in compared}
    # Every tokenizer is read with these two from the hub: without one of them, this is another tokenizer.
    needed = (_TOKENIZER_CONFIG,) if _versions(source) else (_TOKENIZER_CONFIG, _TOKENIZER)
    return {
        name: change
        for name, change in found.items()
        if change is not None and (change is not FileChange.NOT_CACHED or name in needed)
    }


def _change(source: str, name: str, known: str | None) -> FileChange | None:
    if known is None and not Path(source).is_dir():
        return None
    try:
        path = file_of(source, name)
    except NotCachedError:
        return FileChange.NOT_CACHED
    if path is None:
        return None if known is None else FileChange.MISSING
    if known is None:
        return FileChange.ADDED
    return None if digest_of(path) == known else FileChange.CHANGED


def _versions(source: str) -> list[str]:
    """Names of the files one of which is read in place of tokenizer.json."""
    path = _known_file(source, _TOKENIZER_CONFIG)
    try:
        content = {} if path is None else json.loads(path.read_bytes())
    except ValueError:  # said where the tokenizer is loaded
        content = {}
    versions = content.get(_VERSIONED) if isinstance(content, dict) else None
    return [name for name in versions if isinstance(name, str)] if isinstance(versions, list) else []


def _known_file(source: str, name: str) -> Path | None:
    try:
        return file_of(source, name)
    except NotCachedError:
        return None
