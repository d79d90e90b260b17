"""The flags `--json` and `--write` of recipes that print numbers."""

from __future__ import annotations

import sys
from pathlib import Path

from bmoe_lightning.utils.atomic_io import write_text
from recipes.common.readme import fill


def json_written(path: str | None, text: str) -> bool:
    """Write the file of `--json`, if the flag is given; returns False, with the reason on stderr, if that fails."""
    if path is None:
        return True
    try:
        write_text(Path(path), text)
    except OSError as error:
        print(f"error: --json {path} cannot be written ({error.strerror or error})", file=sys.stderr)
        return False
    return True


def place_filled(path: str | None, place: str, content: str) -> bool:
    """Replace a generated section of the page of `--write`, likewise; see `recipes.common.readme.fill`."""
    if path is None:
        return True
    try:
        fill(Path(path), place, content)
    except (OSError, ValueError) as error:
        print(f"error: --write {path}: {error}", file=sys.stderr)
        return False
    return True
