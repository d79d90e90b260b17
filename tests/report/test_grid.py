"""Tables in the layout of papers, in Markdown and JSON."""

from __future__ import annotations

import json
import math
import statistics

import pytest

from bmoe_lightning.report.grid import (
    Cell,
    Grid,
    GridBlock,
    GridRow,
    Mark,
    NumberFormat,
    grid_json,
    grid_markdown,
    marks,
)

LOWER, HIGHER = NumberFormat(higher_is_better=False), NumberFormat(higher_is_better=True, digits=1, scale=100)


def column(format, *means):
    rows = tuple(GridRow(f"r{n}", f"Row {n}", (None if mean is None else Cell(mean),)) for n, mean in enumerate(means))
    return GridBlock("", (format,), rows)


def marked(format, *means):
    return {int(key[1:]): mark for (key, _), mark in marks(column(format, *means)).items()}


class TestMarks:
    def test_the_worse_of_two_is_not_marked(self):
        assert marked(LOWER, 0.3, 0.1) == {1: Mark.BEST}
        assert marked(HIGHER, None, 0.3, 0.1) == {1: Mark.BEST}
        assert marked(LOWER, 0.1, 0.1) == {0: Mark.BEST, 1: Mark.BEST}

    def test_lowest_or_highest(self):
        assert marked(LOWER, 0.3, 0.1, 0.2) == {1: Mark.BEST, 2: Mark.SECOND}
        assert marked(HIGHER, 0.3, 0.1, 0.2) == {0: Mark.BEST, 2: Mark.SECOND}

    def test_numbers_are_compared_as_printed(self):
        assert marked(LOWER, 0.1001, 0.1004, 0.1006) == {0: Mark.BEST, 1: Mark.BEST, 2: Mark.SECOND}
        assert marked(HIGHER, 0.8001, 0.8004, 0.79) == {0: Mark.BEST, 1: Mark.BEST, 2: Mark.SECOND}

    def test_missing_and_undefined_numbers_have_no_place(self):
        assert marked(LOWER, None, math.nan, 0.2, 0.3) == {2: Mark.BEST, 3: Mark.SECOND}
        assert marked(LOWER, math.inf, 0.2) == {1: Mark.BEST}

    def test_nothing_is_best_alone_or_without_an_order(self):
        assert marked(LOWER, 0.3) == {}
        assert marked(LOWER, 0.3, None) == {}
        assert marked(NumberFormat(), 0.3, 0.1) == {}

    def test_rows_from_elsewhere_are_not_compared(self):
        block = column(LOWER, 0.3, 0.2)
        published = GridRow("p", "Published", (Cell(0.1),), is_ranked=False)
        assert marks(GridBlock("", block.formats, (*block.rows, published))) == marks(block)


def test_a_cell_is_mean_and_deviation_over_seeds():
    values = (0.31, 0.28, 0.4, 0.33, 0.29)
    cell = Cell.of(values, range(5))
    assert cell.mean == pytest.approx(sum(values) / 5)
    assert cell.std == pytest.approx(statistics.stdev(values))
    assert Cell.of([0.3], [7]) == Cell(0.3, None, (0.3,), (7,))
    assert Cell.of([0.3, math.inf], [0, 1]).mean == math.inf
    with pytest.raises(ValueError, match="2 for 1 seeds"):
        Cell.of([1.0, 2.0], [0])


@pytest.mark.parametrize(
    ("format", "value", "text"),
    [
        (LOWER, 0.12345, "0.123"),
        (HIGHER, 0.12345, "12.3"),
        (LOWER, -0.0001, "0.000"),
        (LOWER, math.inf, "inf"),
        (NumberFormat(signed=True, digits=1, scale=100), 0.1234, "+12.3"),
    ],
)
def test_numbers_as_printed(format, value, text):
    assert format.text(value) == text


def grid():
    block = GridBlock(
        "NLL ↓",
        (LOWER, LOWER),
        (
            GridRow("a", "A | B", (Cell.of([0.5, 0.7], [0, 1]), None)),
            GridRow("c", "C", (Cell.of([0.4], [0]), Cell.of([0.25, 0.35], [0, 1]))),
        ),
    )
    return Grid("small", "A caption.", "method", ("One", "Two|2"), (block,))


def test_markdown():
    assert grid_markdown(grid()).splitlines() == [
        "A caption.",
        "",
        "| method | One | Two\\|2 |",
        "| --- | ---: | ---: |",
        "| *NLL ↓* |  |  |",
        "| A \\| B | 0.600 ± 0.141 | \N{EN DASH} |",
        "| C | **0.400** | 0.300 ± 0.071 |",
    ]


def test_an_undefined_number_has_no_deviation():
    block = GridBlock("", (LOWER,), (GridRow("a", "A", (Cell.of([math.nan, 0.5], [0, 1]),)),))
    assert grid_markdown(Grid("x", "", "", ("a",), (block,))).splitlines()[-1] == "| A | nan |"


def test_json_has_every_digit_and_every_seed():
    content = grid_json(grid())
    row = content["blocks"][0]["rows"][0]
    assert row["cells"]["One"] == {
        "mean": 0.6,
        "std": statistics.stdev([0.5, 0.7]),
        "n": 2,
        "seeds": [0, 1],
        "values": [0.5, 0.7],
    }
    assert row["cells"]["Two|2"] is None
    infinite = Grid("x", "", "", ("a",), (column(LOWER, math.inf),))
    assert '"inf"' in json.dumps(grid_json(infinite), allow_nan=False)


def test_a_table_whose_rows_do_not_fit_is_refused():
    with pytest.raises(ValueError, match="has 2 columns, but row r0 of block '' has 1 cells"):
        Grid("x", "", "", ("a", "b"), (column(LOWER, 0.3),))
    with pytest.raises(ValueError, match="has no rows"):
        Grid("x", "", "", ("a",), (GridBlock("", (LOWER,), ()),))
    with pytest.raises(ValueError, match="has a column twice: a, a; name each differently"):
        Grid("x", "", "", ("a", "a"), (column(LOWER, 0.3),))
    twice = GridBlock("", (LOWER,), column(LOWER, 0.3).rows * 2)
    with pytest.raises(ValueError, match="has a row twice: r0, r0"):
        Grid("x", "", "", ("a",), (twice,))
