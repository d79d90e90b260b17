"""The files of a model, beside its weights, that predictions depend on: its configuration, and those of its tokenizer.

`generation_config.json` and templates of chats are none of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from transformers import PreTrainedTokenizerBase

from bmoe_lightning.models.loading import model_source
from bmoe_lightning.utils.file_digest import digest_of

CONFIG_FILES = ("config.json",)

TOKENIZER_FILES = (
    *CONFIG_FILES,  # its model type may choose the class of the tokenizer
    "tokenizer.json",
    "tokenizer_config.json",
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


def file_digests(source: str, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 digests of those files that a model has, by name.

    Args:
        source: Local folder or hub id.
        names: Names of files.

    Raises:
        ModelUnavailableError: As `file_of`.
        OSError: If a file cannot be read.
    """
    found = {name: file_of(source, name) for name in names}
    return {name: digest_of(path) for name, path in found.items() if path is not None}
