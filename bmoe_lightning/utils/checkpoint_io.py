"""Read checkpoints of Lightning: tensors and plain values, and no other object is created."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch

from bmoe_lightning.utils.file_header import DamagedFileError, check_readable

STATE_DICT = "state_dict"


class UnsafeCheckpointError(ValueError):
    """A checkpoint contains objects other than tensors and plain values, unpickling which can run code."""


def read_checkpoint(path: Path, name: str = "checkpoint", *, remedy: str) -> dict[str, Any]:
    """The content of a checkpoint, with a mapping as its `state_dict`; the tensors of a zip file are mapped from it.

    The file is loaded with `weights_only=True`: it may come from somewhere else, and unpickling could run arbitrary
    code.

    Args:
        path: The file.
        name: What the file is, for messages.
        remedy: What to do if it cannot be used, the second half of a message's last sentence.

    Raises:
        OSError: If the file is missing or cannot be read.
        UnsafeCheckpointError: If it contains objects that need unpickling.
        DamagedFileError: If it is damaged, or no checkpoint of Lightning.
        ValueError: If no file can have this path.
    """
    check_readable(path, name)
    damaged = DamagedFileError(f"the {name} {path} is damaged, or no checkpoint of Lightning; {remedy}")
    try:
        # torch cannot map files of the format that it had before 1.6.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        check_safe(path, f"the {name} {path} contains", remedy=remedy)
        raise damaged from error
    except (OSError, MemoryError):
        raise
    except Exception as error:  # whatever a file that is no such checkpoint makes it raise
        raise damaged from error
    if not isinstance(content, Mapping) or not isinstance(content.get(STATE_DICT), Mapping):
        raise damaged
    return dict(content)


def check_safe(file: Path | IO[bytes], what: str, *, remedy: str) -> None:
    """Check that a file of `torch.save` can be loaded without unpickling objects; nothing is said of other files.

    Args:
        file: Its path, or the open file.
        what: What contains objects, the beginning of the message.
        remedy: What else can be done, the last words of the message.

    Raises:
        UnsafeCheckpointError: If it contains objects that need it; the message names their classes.
    """
    if isinstance(file, Path) and not zipfile.is_zipfile(file):
        return
    classes = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    if classes:
        raise UnsafeCheckpointError(
            f"{what} objects of {', '.join(sorted(classes)[:3])}, and unpickling objects other than tensors and plain "
            "values can run code. Exclude them from the checkpoint (save_hyperparameters(ignore=[...]), plain values "
            "in state_dict and on_save_checkpoint), allow trusted classes with torch.serialization.add_safe_globals, "
            f"or {remedy}."
        )
