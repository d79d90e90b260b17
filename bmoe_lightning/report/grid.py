"""Tables in the layout of papers: blocks of rows, mean ± deviation over seeds, best in bold, second best underlined.

A grid is data; `grid_markdown` and `grid_json` are here, `grid_latex` in `latex.py`. All write the same cells.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from bmoe_lightning.report.files import jsonable

MISSING = "\N{EN DASH}"
"""Stands for a number that there is none of."""


@dataclass(frozen=True)
class NumberFormat:
    """How the numbers of a column are printed and ordered.

    Attributes:
        higher_is_better: Whether higher numbers are better; None for numbers that are not ordered.
        digits: Digits after the decimal point.
        scale: Factor before printing, such as 100 for percent.
        signed: Whether positive numbers have a sign.
    """

    higher_is_better: bool | None = None
    digits: int = 3
    scale: float = 1.0
    signed: bool = False

    def text(self, value: float) -> str:
        """A number as it is printed."""
        if not math.isfinite(value):
            return str(value)
        rounded = round(self.scale * value, self.digits) + 0.0  # no negative zero
        return f"{rounded:{'+' if self.signed else ''}.{self.digits}f}"


@dataclass(frozen=True)
class Cell:
    """A number of one row and column.

    Attributes:
        mean: Mean over seeds.
        std: Standard deviation over seeds (n - 1); None for a single seed.
        values: Number of each seed; empty for a number from elsewhere.
        seeds: Seeds of the numbers.
    """

    mean: float
    std: float | None = None
    values: tuple[float, ...] = ()
    seeds: tuple[int, ...] = ()

    @classmethod
    def of(cls, values: Sequence[float], seeds: Sequence[int]) -> Cell:
        """A cell from the numbers of all seeds.

        Args:
            values: One number a seed, at least one.
            seeds: Seeds of the numbers.

        Raises:
            ValueError: If there are no numbers, or not one for each seed.
        """
        if not values or len(values) != len(seeds):
            raise ValueError(f"a cell needs a number for each seed, found {len(values)} for {len(seeds)} seeds")
        if not all(map(math.isfinite, values)):
            mean = sum(values) / len(values)
            return cls(mean, None if len(values) == 1 else math.nan, tuple(values), tuple(seeds))
        std = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), std, tuple(values), tuple(seeds))


@dataclass(frozen=True)
class GridRow:
    """A row.

    Attributes:
        key: Identifier, unique in its block.
        label: Display name.
        cells: One a column; None for a number that there is none of.
        is_ranked: Whether the row takes part in what is best; not one from elsewhere.
    """

    key: str
    label: str
    cells: tuple[Cell | None, ...]
    is_ranked: bool = True


@dataclass(frozen=True)
class GridBlock:
    """Rows below each other that are compared.

    Attributes:
        title: Title, such as the metric; empty for none.
        formats: Format of each column.
        rows: The rows.
    """

    title: str
    formats: tuple[NumberFormat, ...]
    rows: tuple[GridRow, ...]


@dataclass(frozen=True)
class Grid:
    """A table.

    Attributes:
        name: Identifier, for files and references.
        caption: Caption, plain text.
        stub: Title of the column of labels.
        columns: Titles of the columns.
        blocks: Its blocks.

    Raises:
        ValueError: If there are no rows, a column or row stands twice, or a row has not one cell for each column.
    """

    name: str
    caption: str
    stub: str
    columns: tuple[str, ...]
    blocks: tuple[GridBlock, ...]

    def __post_init__(self) -> None:
        if not any(block.rows for block in self.blocks):
            raise ValueError(f"the table {self.name} has no rows; give it at least one")
        for kind, names in (("column", self.columns), *(("row", [row.key for row in b.rows]) for b in self.blocks)):
            if len(set(names)) < len(names):
                raise ValueError(f"the table {self.name} has a {kind} twice: {', '.join(names)}; name each differently")
        for block in self.blocks:
            for row in block.rows:
                if not len(row.cells) == len(block.formats) == len(self.columns):
                    raise ValueError(
                        f"the table {self.name} has {len(self.columns)} columns, but row {row.key} of block "
                        f"{block.title!r} has {len(row.cells)} cells and {len(block.formats)} formats"
                    )


class Mark(Enum):
    """How a number stands out."""

    BEST = "best"
    SECOND = "second"


def marks(block: GridBlock) -> dict[tuple[str, int], Mark]:
    """The best and second best numbers of each column, by row key and column.

    Numbers are compared as printed, since a difference that the table does not show must not decide: rows of equal text
    share a mark. Nothing is marked where rows are not compared: in columns without an order or with a single number. Of
    two numbers the second best is the worst one, which is not marked.

    Args:
        block: Block of a grid.
    """
    found = {}
    for column, format in enumerate(block.formats):
        cells = {row.key: row.cells[column] for row in block.rows if row.is_ranked}
        texts = {key: format.text(cell.mean) for key, cell in cells.items() if cell is not None}
        ordered = sorted(
            {float(text) for text in texts.values() if text != "nan"}, reverse=format.higher_is_better is True
        )
        if format.higher_is_better is None or len(texts) < 2:
            continue
        given = Mark if len(texts) > 2 else [Mark.BEST]
        places = dict(zip(ordered, given, strict=False))  # the marks, for the first numbers
        found.update({(key, column): places[float(text)] for key, text in texts.items() if float(text) in places})
    return found


def cell_texts(cell: Cell | None, format: NumberFormat) -> tuple[str, str]:
    """Mean and deviation of a cell as printed; that of a single seed, or of undefined numbers, is empty.

    Args:
        cell: Cell, or None.
        format: Its column's format.
    """
    if cell is None:
        return MISSING, ""
    spread = NumberFormat(digits=format.digits, scale=format.scale)
    return format.text(cell.mean), "" if cell.std is None or math.isnan(cell.std) else spread.text(cell.std)


def grid_markdown(grid: Grid) -> str:
    """A grid in Markdown, caption above it; the title of a block is a row in italics.

    Args:
        grid: Table.
    """
    lines = [[grid.stub, *grid.columns], ["---", *["---:"] * len(grid.columns)]]
    for block in grid.blocks:
        if block.title:
            lines.append([f"*{block.title}*", *[""] * len(grid.columns)])
        marked = marks(block)
        for row in block.rows:
            cells = []
            for column, (cell, format) in enumerate(zip(row.cells, block.formats, strict=True)):
                mean, std = cell_texts(cell, format)
                cells.append(_marked(mean, marked.get((row.key, column))) + (f" ± {std}" if std else ""))
            lines.append([row.label, *cells])
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return f"{grid.caption}\n\n{table}\n"


def grid_json(grid: Grid) -> dict[str, Any]:
    """A grid as plain values: unrounded numbers; those that are not finite as the strings `inf`, `-inf` and `nan`.

    Args:
        grid: Table.
    """
    return {
        "name": grid.name,
        "caption": grid.caption,
        "blocks": [
            {
                "title": block.title,
                "rows": [
                    {
                        "key": row.key,
                        "label": row.label,
                        **({} if row.is_ranked else {"from_elsewhere": True}),
                        "cells": {
                            column: None if cell is None else _cell_json(cell)
                            for column, cell in zip(grid.columns, row.cells, strict=True)
                        },
                    }
                    for row in block.rows
                ],
            }
            for block in grid.blocks
        ],
    }


def _cell_json(cell: Cell) -> dict[str, Any]:
    content = {"mean": cell.mean, "std": cell.std, "n": len(cell.seeds), "seeds": cell.seeds, "values": cell.values}
    return {key: jsonable(value) for key, value in content.items()}


def _marked(text: str, mark: Mark | None) -> str:
    return {Mark.BEST: f"**{text}**", Mark.SECOND: f"<u>{text}</u>"}[mark] if mark else text
