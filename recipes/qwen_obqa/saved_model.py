"""Folders of small models, written in one step, whose files are verified before they are used."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import warnings
from pathlib import Path

from transformers import PreTrainedTokenizerBase, Qwen2MoeForCausalLM

RECORD_FILE = "pretraining.json"
"""Statistics of the training, and a SHA-256 digest of every other file of the folder."""

UNFINISHED = ".unfinished-"
"""Prefix of folders that are being written."""


def is_intact(folder: Path) -> bool:
    """Whether a folder has the files that `save_model` wrote; a damaged folder is removed, with a warning."""
    if not folder.is_dir():
        return False
    record = folder / RECORD_FILE
    try:
        expected = json.loads(record.read_text(encoding="utf-8"))["sha256"]
        damaged = [folder / name for name, digest in expected.items() if _digest(folder / name) != digest]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        damaged = [record]
    if not damaged:
        return True
    warnings.warn(f"{damaged[0]} is damaged; the small model is created again", stacklevel=3)
    shutil.rmtree(folder)
    return False


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def save_model(
    folder: Path, model: Qwen2MoeForCausalLM, tokenizer: PreTrainedTokenizerBase, record: dict[str, float]
) -> None:
    """Write a checkpoint folder under a temporary name and rename it, so that an interrupted run leaves none.

    Args:
        folder: Target folder; if another process has written it in the meantime, that one stays.
        model: Model to save.
        tokenizer: Tokenizer of the model.
        record: Statistics of the training, for `RECORD_FILE`.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=folder.parent))
    try:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        digests = {path.name: _digest(path) for path in sorted(unfinished.iterdir())}
        text = json.dumps({**record, "sha256": digests}, indent=2) + "\n"
        (unfinished / RECORD_FILE).write_text(text, encoding="utf-8")
        try:
            unfinished.replace(folder)
        except OSError:
            # Another process has written the same model first.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
