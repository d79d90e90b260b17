"""The folder of the runs that faults are injected into: it is emptied, and a folder of the user is not."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

NAME, MARKER = "runs-with-faults", ".made-by-recipes.faults"


def emptied_folder(output: Path) -> Path:
    """Make the folder, or empty the one of an earlier command.

    Args:
        output: Output folder, which this process has locked.

    Returns:
        The folder, which has its marker only.

    Raises:
        FileExistsError: If there is something of that name without the marker.
        OSError: If it cannot be written or emptied.
    """
    folder = output / NAME
    marker = folder / MARKER
    foreign = folder.exists() and not (folder.is_dir() and (marker.is_file() or not any(folder.iterdir())))
    if folder.is_symlink() or foreign:
        raise FileExistsError(
            f"{folder} was not made by this command, which would empty it: it has no {MARKER}; move it away, or give "
            "another --output-dir"
        )
    folder.mkdir(exist_ok=True)
    marker.touch()
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path != marker:
            path.unlink()
    return folder


def remove_folder(output: Path) -> None:
    """Remove the folder of `emptied_folder`; what cannot be removed stays, with the marker."""
    with suppress(OSError):
        folder = emptied_folder(output)
        (folder / MARKER).unlink()
        folder.rmdir()
