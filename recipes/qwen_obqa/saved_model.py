"""Model folders that are written in one step, and whose files are verified before they are used."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bmoe_lightning.utils.file_digest import digest_of
from bmoe_lightning.utils.new_folder import FolderFilledError, new_folder

RECORD_FILE = "pretraining.json"
"""Statistics of the training of a small model, and a SHA-256 digest of every other file of the folder."""


def is_intact(folder: Path) -> bool:
    """Whether a folder has the files that `save_model` wrote; a damaged folder is removed, with a warning."""
    if not folder.is_dir():
        return False
    damaged = damaged_file(folder)
    if damaged is None:
        return True
    warnings.warn(f"{damaged} is damaged; the small model is created again", stacklevel=3)
    shutil.rmtree(folder)
    return False


def damaged_file(folder: Path, record_file: str = RECORD_FILE) -> Path | None:
    """The first file of a folder that is not as `save_model` wrote it; None if all are.

    Args:
        folder: The folder.
        record_file: Name of the record.
    """
    record = folder / record_file
    try:
        expected = json.loads(record.read_text(encoding="utf-8"))["sha256"]
        paths = {folder / name: digest for name, digest in expected.items()}
        return next((path for path, digest in paths.items() if not path.is_file() or digest_of(path) != digest), None)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return record


def save_model(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    record: Mapping[str, float | str],
    record_file: str = RECORD_FILE,
) -> None:
    """Write a checkpoint folder under a temporary name and rename it, so that an interrupted run leaves none.

    Args:
        folder: Target folder; if another process has written it in the meantime, that one stays.
        model: Model to save.
        tokenizer: Tokenizer of the model.
        record: Entries of the record, beside the digests of the files.
        record_file: Name of the record.

    Raises:
        OSError: If it cannot be written.
    """
    with suppress(FolderFilledError), new_folder(folder) as unfinished:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        digests = {path.name: digest_of(path) for path in sorted(unfinished.iterdir())}
        text = json.dumps({**record, "sha256": digests}, indent=2) + "\n"
        (unfinished / record_file).write_text(text, encoding="utf-8")
