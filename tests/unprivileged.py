"""A folder in which permissions are refused: the superuser, as whom tests may run, can read everything."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NOBODY = 65534


@contextmanager
def unprivileged_folder() -> Iterator[Path]:
    """A temporary folder of a user who is not the superuser, as whom this process runs meanwhile."""
    folder = Path(tempfile.mkdtemp()).resolve()
    is_superuser = os.geteuid() == 0
    if is_superuser:
        os.chown(folder, _NOBODY, _NOBODY)
        os.seteuid(_NOBODY)
    try:
        yield folder
    finally:
        if is_superuser:
            os.seteuid(0)
        for path in [folder, *folder.rglob("*")]:
            if path.is_dir() and not path.is_symlink():
                path.chmod(0o700)
        shutil.rmtree(folder)
