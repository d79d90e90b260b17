"""The survey of all families as a markdown table."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence

import torch
import transformers
from transformers.utils import logging

from recipes.supported_models.catalogue import uses_interface
from recipes.supported_models.survey import Row, survey

PLACE = "supported models"
_HEAD = ("family", "expert layers", "layout", "oracle error", "float32 error", "padding", "router", "notes")


def surveyed(names: Sequence[str]) -> Iterator[Row]:
    """Survey families one by one, with progress on stderr; an exception becomes a failed row."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # which optional kernels are missing
    try:
        for number, name in enumerate(names, 1):
            start = time.perf_counter()
            try:
                row = survey(name)
            except Exception as error:  # noqa: BLE001  (one family must not hide the others; the row says FAILED)
                row = Row(name, uses_interface(name), failed=f"{type(error).__name__}: {error}")
            seconds = time.perf_counter() - start
            print(f"[{number}/{len(names)}] {name}: {_verdict(row)} ({seconds:.1f} s)", file=sys.stderr)
            yield row
    finally:
        logging.set_verbosity(verbosity)


def table(rows: Sequence[Row]) -> str:
    """All rows as a markdown table."""
    lines = [_HEAD, ("---",) * len(_HEAD), *(_cells(row) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def summary(rows: Sequence[Row]) -> str:
    """The numbers of families that are supported, refused and failed, in sentences."""
    theirs = [row for row in rows if not row.own]
    own = [row for row in rows if row.own]
    text = []
    if theirs:
        with_interface, others = (
            f"{sum(row.supported for row in theirs if row.interface is has)} of the "
            f"{sum(row.interface is has for row in theirs)}"
            for has in (True, False)
        )
        text.append(
            f"{sum(row.supported for row in theirs)} of {len(theirs)} families of transformers are supported: "
            f"{with_interface} that use its experts interface, {others} others."
        )
    if own:
        text.append(f"Of those that this library brings: {sum(row.supported for row in own)} of {len(own)}.")
    for count, what in (
        (sum(row.supported and row.routers is not None for row in rows), "have supported routers."),
        (sum(row.supported and bool(row.wrapper) for row in rows), "compared as multimodal wrappers, given text only."),
        (sum(row.refused is not None for row in rows), "refused."),
        (sum(row.complaint is not None for row in rows), "FAILED."),
    ):
        if count:
            text.append(f"{count} {what}")
    return " ".join(text)


def versions() -> str:
    """The versions of torch and transformers that were surveyed."""
    return f"torch {torch.__version__.partition('+')[0]}, transformers {transformers.__version__}."


def section(rows: Sequence[Row]) -> str:
    """Counts, versions, the largest error and the table, as markdown."""
    errors = [row.error for row in rows if row.error is not None]
    largest = f" Largest relative error against the dense references: {max(errors):.0e}." if errors else ""
    return f"{summary(rows)} {versions()}{largest}{_padding_summary(rows)}\n\n{table(rows)}"


def _padding_summary(rows: Sequence[Row]) -> str:
    """The largest error on a right side, the smallest on a wrong one, and the families that have one."""
    right = [row.padding[side] for row in rows for side in row.padding_sides]
    wrong = {
        row.family: [error for side, error in row.padding.items() if side not in row.padding_sides] for row in rows
    }
    wrong = {family: errors for family, errors in wrong.items() if errors}
    text = f" Padding on a side that the table names changes a row by at most {max(right):.0e}" if right else ""
    if right and wrong:
        names = ", ".join(f"{family} ({max(errors):.1g})" for family, errors in wrong.items())
        text += f"; on another side it changes those of {names}"
    return f"{text}." if text else ""


def _cells(row: Row) -> tuple[str, ...]:
    notes = [*row.notes, *([row.wrapper] if row.wrapper else [])]
    notes += [] if row.interface else ["without the experts interface"]
    if row.refused is not None:
        return row.family, "", "", "", "", "", "", f"refused: {_one_line(row.refused)}"
    if row.complaint is not None:
        notes.insert(0, f"**FAILED**: {_one_line(row.complaint)}")
    layers = "; ".join(f"{count} x {experts} experts" for experts, count in Counter(row.experts).items())
    errors = _number(row.error), _number(row.float32_error)
    return row.family, layers, row.layout, *errors, _sides(row), _routers(row), ", ".join(notes)


def _routers(row: Row) -> str:
    """What the routers do, and why others are not supported, in words."""
    refusal = [] if row.router_refusal is None else [f"refused: {_one_line(row.router_refusal)}"]
    return "; ".join([*([] if row.routers is None else [row.routers]), *refusal])


def _sides(row: Row) -> str:
    """The sides on which padding does not change a row, in words."""
    if not row.padding:
        return ""
    sides = row.padding_sides
    return "both" if len(sides) == len(row.padding) else " ".join(sides) or "neither"


def _verdict(row: Row) -> str:
    if row.refused is not None:
        return f"refused: {_sentence(row.refused)}"
    return f"error {_number(row.error)}" if row.complaint is None else f"FAILED: {_one_line(row.complaint)}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _one_line(text: str) -> str:
    return " ".join(text.replace("|", "/").split())


def _sentence(text: str | None) -> str:
    """The first sentence of a reason."""
    return _one_line(text or "").partition(". ")[0].rstrip(".")
