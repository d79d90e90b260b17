"""Numbers of a publication, shown below ours where the set-up is the same.

They stand in `published.json` in this folder, if there is one: by preset, a list of objects with `table` (the name of
the table), `metric`, `label` (of the row), `data` (the column's data set), `mean` and, where it is known, `std`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bmoe_lightning.report import Cell, GridRow

_FILE = Path(__file__).with_name("published.json")


@dataclass(frozen=True)
class Published:
    """Numbers of a publication.

    Attributes:
        by_preset: Entries of each preset.
    """

    by_preset: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)

    def rows(self, preset: str, table: str, metric: str, columns: Sequence[str]) -> list[GridRow]:
        """The rows of a block, which are not compared with ours.

        Args:
            preset: Name of the preset.
            table: Name of the table.
            metric: Name of the metric.
            columns: Data sets of the columns.
        """
        found: dict[str, dict[str, Cell]] = {}
        for entry in self.by_preset.get(preset, ()):
            if (entry["table"], entry["metric"]) == (table, metric):
                found.setdefault(entry["label"], {})[entry["data"]] = Cell(entry["mean"], entry.get("std"))
        return [
            GridRow(f"published: {label}", f"{label} (published)", tuple(map(cells.get, columns)), is_ranked=False)
            for label, cells in found.items()
        ]


def read_published(path: Path = _FILE) -> Published:
    """Read the file; nothing is published if there is none.

    Args:
        path: JSON file, which need not exist.
    """
    return Published(json.loads(path.read_text()) if path.is_file() else {})
