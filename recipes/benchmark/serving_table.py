"""The section `serving` as a short table: a row for each method."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

from recipes.benchmark.measure import Ratio, Section, Spread
from recipes.benchmark.serving import BATCHES, memory_name, time_name
from recipes.common.report_parts import markdown_table

_WIDTH = 120


def serving_table(section: Section, machine: Mapping[str, str]) -> str:
    """Markdown: time and memory of each method at each batch size, and the other ratios below.

    Args:
        section: The section.
        machine: Versions, number of threads and processor by name.
    """
    ratios = {ratio.name: ratio for ratio in section.ratios}
    memory = {amount.name: Spread.of(amount.values).median for amount in section.amounts if amount.unit == "MB"}
    forward = {size: Spread.of(_forward(section, size)).median for size in BATCHES}
    first, *_ = suffixes = [time_name("", size) for size in BATCHES]
    labels = [name.removesuffix(first) for name in ratios if name.endswith(first)]
    labels = [label for label in labels if all(label + suffix in ratios for suffix in suffixes)]
    others = [ratio for name, ratio in ratios.items() if name not in {x + y for x in labels for y in suffixes}]
    head = [
        "method",
        *(f"time, batch of {size}" for size in BATCHES),
        *(f"further memory, batch of {size}" for size in BATCHES),
    ]
    rows = [
        [
            label,
            *(f"{ratios[time_name(label, size)].spread.median:.3g}" for size in BATCHES),
            *(f"{max(memory[memory_name(label, size)], 0.0):.0f} MB" for size in BATCHES),
        ]
        for label in labels
    ]
    plain = " and ".join(
        f"{forward[size] * 1e3:.0f} ms and {memory[memory_name(None, size)]:.0f} MB for a batch of {size}"
        for size in BATCHES
    )
    caption = (
        "Times are medians of ratios to a plain forward pass of the same batch, memory is what a prediction takes "
        f"beyond that pass. It takes {plain}. {' '.join(section.notes)} Measured with "
        f"{', '.join(f'{key} {value}' for key, value in machine.items())}."
    )
    return "\n\n".join(
        [
            markdown_table(head, rows),
            markdown_table(["ratio", "median", "bar"], [_cells(ratio) for ratio in others]),
            textwrap.fill(caption, width=_WIDTH),
        ]
    )


def _forward(section: Section, size: int) -> tuple[float, ...]:
    name = memory_name(None, size)
    return next(amount.values for amount in section.amounts if amount.name == name and amount.unit == "s")


def _cells(ratio: Ratio) -> list[str]:
    median = ratio.spread.median
    return [ratio.name, f"{median:.3g}", "" if ratio.bar is None else f"{ratio.bar:.2g}"]
