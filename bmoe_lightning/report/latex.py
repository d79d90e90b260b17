"""Grids as LaTeX tables, which need no package but booktabs."""

from __future__ import annotations

import re

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
_COMMAND = {Mark.BEST: "textbf", Mark.SECOND: "underline"}


def grid_latex(grid: Grid) -> str:
    """A grid as a LaTeX `table` with booktabs rules; the title of a block is a row of its own.

    Args:
        grid: Table.
    """
    header = " & ".join(map(latex_escaped, [grid.stub, *grid.columns]))
    lines = [
        r"\begin{table}",
        r"  \centering",
        rf"  \caption{{{latex_escaped(grid.caption)}}}",
        rf"  \label{{tab:{re.sub(r'[^a-z0-9]+', '-', grid.name)}}}",
        rf"  \begin{{tabular}}{{l{'r' * len(grid.columns)}}}",
        r"    \toprule",
        rf"    {header} \\",
    ]
    for block in grid.blocks:
        lines += [r"    \midrule", *(f"    {line}" for line in _block(block, len(grid.columns)))]
    lines += [r"    \bottomrule", r"  \end{tabular}", r"\end{table}"]
    return "\n".join(lines) + "\n"


def latex_escaped(text: str) -> str:
    """Text with characters that LaTeX would read as commands, and symbols that this package writes, replaced.

    Letters beyond Latin-1 are left as they are, and need XeLaTeX or LuaLaTeX with a font that has them.

    Args:
        text: Plain text.
    """
    return "".join(_SPECIAL.get(character, character) for character in text)


def _block(block: GridBlock, columns: int) -> list[str]:
    lines = []
    if block.title:
        lines.append(rf"\multicolumn{{{columns + 1}}}{{l}}{{\textit{{{latex_escaped(block.title)}}}}} \\")
    marked = marks(block)
    for row in block.rows:
        cells = [latex_escaped(row.label)]
        for column, (cell, format) in enumerate(zip(row.cells, block.formats, strict=True)):
            mean, std = map(_number, cell_texts(cell, format))
            mark = marked.get((row.key, column))
            text = rf"\{_COMMAND[mark]}{{{mean}}}" if mark else mean
            cells.append(rf"{text} {{\scriptsize $\pm$ {std}}}" if std else text)
        lines.append(" & ".join(cells) + r" \\")
    return lines


def _number(text: str) -> str:
    if text.endswith("inf"):
        return rf"${text.removesuffix('inf')}\infty$"
    return f"${text}$" if text.startswith(("-", "+")) else latex_escaped(text)
