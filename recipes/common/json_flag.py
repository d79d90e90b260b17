"""The flag --json of recipes that print figures."""

from __future__ import annotations

import sys
from pathlib import Path

from bmoe_lightning.utils.atomic_io import write_text


def written(path: str, text: str) -> bool:
    """Write the file that --json names; says on stderr why not, where that fails."""
    try:
        write_text(Path(path), text)
    except OSError as error:
        print(f"error: --json {path} cannot be written ({error.strerror or error})", file=sys.stderr)
        return False
    return True
