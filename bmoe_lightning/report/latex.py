"""Grids as LaTeX tables, which need no package but booktabs."""

from __future__ import annotations

import math
import re
from itertools import pairwise

from bmoe_lightning.report.grid import Grid, GridBlock, Mark, cell_texts, marks

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "<": "$<$",
    ">": "$>$",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "\N{MULTIPLICATION SIGN}": r"$\times$",
    "\N{MINUS SIGN}": "$-$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "λ": r"$\lambda$",
    "κ": r"$\kappa$",
    "\N{EN DASH}": "--",
    "…": r"\ldots{}",
}
_MOST_COLUMNS = 7  # beside that of the labels: a mean with its deviation takes two centimetres
_COMMAND = {Mark.BEST: "textbf", Mark.SECOND: "underline"}


def grid_latex(grid: Grid) -> str:
    """A grid as a LaTeX `table` with booktabs rules; the title of a block is a row of its own.

    A grid of more columns than fit on a page stands in several parts below each other, each with the labels.

    Args:
        grid: Table.
    """
    lines = [
        r"\begin{table}",
        r"  \centering",
        rf"  \caption{{{latex_escaped(grid.caption)}}}",
        rf"  \label{{tab:{re.sub(r'[^a-z0-9]+', '-', grid.name)}}}",
    ]
    for number, columns in enumerate(_parts(len(grid.columns))):
        if number:
            lines += ["", r"  \medskip"]  # an empty line ends the paragraph
        lines += [f"  {line}" for line in _tabular(grid, columns)]
    return "\n".join([*lines, r"\end{table}"]) + "\n"


def _parts(columns: int) -> list[range]:
    """The columns of each part: about equally many, and no more than fit on a page."""
    count = math.ceil(columns / _MOST_COLUMNS)
    bounds = [part * columns // count for part in range(count + 1)]
    return [range(first, last) for first, last in pairwise(bounds)]


def _tabular(grid: Grid, columns: range) -> list[str]:
    header = " & ".join(map(latex_escaped, [grid.stub, *(grid.columns[column] for column in columns)]))
    lines = [rf"\begin{{tabular}}{{l{'r' * len(columns)}}}", r"  \toprule", rf"  {header} \\"]
    for block in grid.blocks:
        lines += [r"  \midrule", *(f"  {line}" for line in _block(block, columns))]
    return [*lines, r"  \bottomrule", r"\end{tabular}"]


def latex_escaped(text: str) -> str:
    """Text with characters that LaTeX would read as commands, and symbols that this package writes, replaced.

    Letters beyond Latin-1 are left as they are, and need XeLaTeX or LuaLaTeX with a font that has them.

    Args:
        text: Plain text.
    """
    return "".join(_SPECIAL.get(character, character) for character in text)


def _block(block: GridBlock, columns: range) -> list[str]:
    lines = []
    if block.title:
        lines.append(rf"\multicolumn{{{len(columns) + 1}}}{{l}}{{\textit{{{latex_escaped(block.title)}}}}} \\")
    marked = marks(block)
    for row in block.rows:
        cells = [latex_escaped(row.label)]
        for column in columns:
            mean, std = map(_number, cell_texts(row.cells[column], block.formats[column]))
            mark = marked.get((row.key, column))
            text = rf"\{_COMMAND[mark]}{{{mean}}}" if mark else mean
            cells.append(rf"{text} {{\scriptsize $\pm$ {std}}}" if std else text)
        lines.append(" & ".join(cells) + r" \\")
    return lines


def _number(text: str) -> str:
    if text.endswith("inf"):
        return rf"${text.removesuffix('inf')}\infty$"
    return f"${text}$" if text.startswith(("-", "+")) else latex_escaped(text)
