"""Grids as LaTeX."""

from __future__ import annotations

import math
import re

from bmoe_lightning.metrics import METRICS
from bmoe_lightning.report.grid import Cell, Grid, GridBlock, GridRow, NumberFormat
from bmoe_lightning.report.latex import grid_latex, latex_escaped

LOWER, CHANGE = NumberFormat(higher_is_better=False), NumberFormat(digits=1, scale=100, signed=True)


def grid():
    rows = (
        GridRow("a", "A & B_1", (Cell.of([0.5, 0.7], [0, 1]), None, Cell(-0.1))),
        GridRow("c", "C", (Cell.of([0.4], [0]), Cell.of([0.25, 0.35], [0, 1]), Cell(0.034))),
        GridRow("d", "D", (Cell(0.9), Cell(math.inf), Cell(0.0))),
    )
    return Grid(
        "two_blocks",
        "5 % of them: 10 ± 1.",
        "method",
        ("One", "Two", "%"),
        (
            GridBlock("NLL ↓", (LOWER, LOWER, CHANGE), rows),
            GridBlock("", (LOWER, LOWER, CHANGE), rows[:1]),
        ),
    )


def test_columns_beyond_the_width_of_a_page_stand_in_parts_below_each_other():
    titles = tuple(metric.header for metric in METRICS)
    cells = tuple(Cell.of([number / 8, 0.5], [0, 1]) for number in range(len(titles)))
    rows = tuple(GridRow(key, key, cells) for key in "abc")
    wide = Grid("wide", "All.", "method", titles, (GridBlock("NLL", (LOWER,) * len(titles), rows),))
    text = grid_latex(wide)
    parts = re.findall(r"\\begin\{tabular\}\{l(r+)\}(.*?)\\end\{tabular\}", text, re.DOTALL)
    widths = [len(columns) for columns, _ in parts]
    assert sum(widths) == len(titles)
    assert max(widths) <= 8
    assert max(widths) - min(widths) <= 1
    shown = []
    for width, (_, body) in zip(widths, parts, strict=True):
        assert rf"\multicolumn{{{width + 1}}}{{l}}" in body
        lines = [line for line in body.splitlines() if " & " in line]
        assert [line.count(" & ") for line in lines] == [width] * 4
        shown += lines[0].strip().removesuffix(r" \\").split(" & ")[1:]
        assert [line.split(" & ")[0].strip() for line in lines[1:]] == ["a", "b", "c"]
    assert shown == [latex_escaped(title) for title in titles]
    assert text.count(r"\caption") == text.count(r"\label") == text.count(r"\begin{table}") == 1


def test_the_whole_table():
    assert (
        grid_latex(grid())
        == r"""\begin{table}
  \centering
  \caption{5 \% of them: 10 $\pm$ 1.}
  \label{tab:two-blocks}
  \begin{tabular}{lrrr}
    \toprule
    method & One & Two & \% \\
    \midrule
    \multicolumn{4}{l}{\textit{NLL $\downarrow$}} \\
    A \& B\_1 & \underline{0.600} {\scriptsize $\pm$ 0.141} & -- & $-10.0$ \\
    C & \textbf{0.400} & \textbf{0.300} {\scriptsize $\pm$ 0.071} & $+3.4$ \\
    D & 0.900 & $\infty$ & $+0.0$ \\
    \midrule
    A \& B\_1 & 0.600 {\scriptsize $\pm$ 0.141} & -- & $-10.0$ \\
    \bottomrule
  \end{tabular}
\end{table}
"""
    )


def test_every_row_has_all_columns_and_braces_are_closed():
    text = grid_latex(grid())
    rows = [line for line in text.splitlines() if line.endswith(r"\\") and "multicolumn" not in line]
    assert all(len(re.findall(r"(?<!\\)&", row)) == 3 for row in rows)
    bare = text.replace(r"\{", "").replace(r"\}", "")
    assert bare.count("{") == bare.count("}")
    assert text.isascii()


def test_every_special_character_is_escaped():
    assert latex_escaped(r"a\b{c}~^&%$#_<>|") == (
        r"a\textbackslash{}b\{c\}\textasciitilde{}\textasciicircum{}\&\%\$\#\_$<$$>$\textbar{}"
    )
    assert latex_escaped("Bröcker") == "Bröcker"


def test_other_letters_are_left_alone():
    assert latex_escaped("Bröcker, 模型") == "Bröcker, 模型"
