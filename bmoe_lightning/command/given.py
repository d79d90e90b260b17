"""What was given to a command and cannot be used: the folder of a run, and a file that cannot be written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bmoe_lightning.serving.loading import Served, load_served
from bmoe_lightning.serving.manifest import MANIFEST_FILE


def served_run(run: Path, *, verify: bool = True) -> Served:
    """The parts of the model in the folder of `--run`.

    Args:
        run: The folder.
        verify: Whether to compare the files of a saved folder with their digests.

    Raises:
        FileNotFoundError: If a file of it is missing.
        ValueError: If it is no such folder, or a file of it is damaged.
    """
    served = load_served(run, verify=verify)
    if served is None:
        found = f"has no {MANIFEST_FILE}" if run.is_dir() else "is a file" if run.exists() else "is not there"
        raise ValueError(
            f"--run {run} {found}; give a folder of CalibratedModel.save_pretrained, or of a finished run of "
            "recipes.qwen_obqa"
        )
    return served


@contextmanager
def written(what: str, folder: Path) -> Iterator[None]:
    """Convert errors of the file system to one that names what was given, and not the temporary files beside it.

    Args:
        what: What is written within the context, such as an option and its value.
        folder: The folder that it is in.

    Raises:
        OSError: If it cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise OSError(
            f"{what} cannot be written ({error.strerror or error}); check the permissions of the folder "
            f"{folder.resolve()} and the space on its disk"
        ) from None
