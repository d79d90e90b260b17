"""Which model families of transformers and of this library work, each compared with a dense oracle on a tiny model."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from recipes.common.readme import ROOT, between

if TYPE_CHECKING:
    from recipes.supported_models.survey import Row

TABLE = ROOT / "recipes" / "supported_models.md"
PLACE = "supported models"
COMMAND = "python -m recipes.supported_models"
_HEAD = ("family", "expert layers", "layout", "oracle error", "float32 error", "notes")
_EXPLANATION = """\
Made by `{command} --write`. For every mixture-of-experts family of the installed transformers, and of this library, a
tiny model with random weights is built from the family's own configuration class. Where a family has a text model and a
multimodal wrapper around it, both are built and the larger error is shown; wrappers are given text only.

*Oracle error*: with float64 weights, the largest relative error of logits, gradients, slot counts, curvature factors
and logit covariance against dense references that watch the model's own code. *float32 error*: with float32 weights,
logits and gradients against the model's own `grouped_mm` (or `batched_mm`, or its only implementation). Both must stay
below {bound:.0e}: most families compute norms and routers in float32 whatever their weights are."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; returns the exit status: 0, 1 (a family fails) or 2 (wrong usage)."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--families", metavar="A,B", help="only these, separated by commas (default: all)")
    parser.add_argument(
        "--write", action="store_true", help="write recipes/supported_models.md and the short form in README.md"
    )
    options = parser.parse_args(arguments)
    # Late: torch and transformers take seconds to import, and --help should not.
    from recipes.supported_models.catalogue import families

    known = families()
    names = (
        known
        if options.families is None
        else sorted({name.strip() for name in options.families.split(",") if name.strip()})
    )
    unknown = sorted(set(names) - set(known))
    if unknown:
        print(
            f"error: no MoE family of the installed transformers or this library: {', '.join(unknown)}", file=sys.stderr
        )
        return 2
    if options.write and options.families is not None:
        print("error: --write takes all families; leave --families out", file=sys.stderr)
        return 2
    rows = list(surveyed(names))
    print(f"{table(rows)}\n\n{summary(rows)} {versions()}")
    failed = [row.family for row in rows if row.complaint is not None]
    if failed:
        print(f"error: {len(failed)} failed: {', '.join(failed)}", file=sys.stderr)
        return 1
    return write(rows) if options.write else 0


def surveyed(names: Sequence[str]) -> Iterator[Row]:
    """Survey families one after the other, with progress on stderr; an exception becomes a row that failed."""
    from transformers.utils import logging

    from recipes.supported_models.catalogue import uses_interface
    from recipes.supported_models.survey import Row, survey

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
    """How many families there are, work, are refused and fail: a few short sentences."""
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
        (sum(row.supported and bool(row.wrapper) for row in rows), "compared as multimodal wrappers, given text only."),
        (sum(row.refused is not None for row in rows), "refused."),
        (sum(row.complaint is not None for row in rows), "FAILED."),
    ):
        if count:
            text.append(f"{count} {what}")
    return " ".join(text)


def versions() -> str:
    """The versions that the table is about."""
    import torch
    import transformers

    return f"torch {torch.__version__.partition('+')[0]}, transformers {transformers.__version__}."


def document(rows: Sequence[Row]) -> str:
    """The whole of `recipes/supported_models.md`."""
    from recipes.supported_models.survey import BOUND

    explanation = _EXPLANATION.format(command=COMMAND, bound=BOUND)
    return f"# Supported model families\n\n{summary(rows)} {versions()}\n\n{explanation}\n\n{table(rows)}\n"


def short_form(rows: Sequence[Row]) -> str:
    """What the README says: the counts, the names in one paragraph, and why others are refused."""
    errors = [row.error for row in rows if row.error is not None]
    names = ", ".join(f"`{row.family}`" for row in rows if row.supported and not row.own)
    parts = [f"{summary(rows)} {versions()} Largest relative error against the dense oracle: {max(errors):.0e}.", names]
    own = ", ".join(f"`{row.family}` ({row.notes[0]})" for row in rows if row.supported and row.own)
    if own:
        parts.append(f"Beside them: {own}.")
    refused = [f"| {row.family} | {_sentence(row.refused)} |" for row in rows if row.refused is not None]
    if refused:
        parts.append("\n".join(["| refused | why |", "| --- | --- |", *refused]))
    return "\n\n".join(parts)


def write(rows: Sequence[Row], table_path: Path = TABLE, readme: Path = ROOT / "README.md") -> int:
    """Write the table and the README's short form; returns the exit status."""
    from bmoe_lightning.utils.atomic_io import write_text

    try:
        text = between(readme.read_text(encoding="utf-8"), PLACE, short_form(rows))
    except ValueError as error:
        print(f"error: nothing was written: {error}", file=sys.stderr)
        return 1
    write_text(table_path, document(rows))
    write_text(readme, text)
    return 0


def _cells(row: Row) -> tuple[str, ...]:
    notes = [*row.notes, *([row.wrapper] if row.wrapper else [])]
    notes += [] if row.interface else ["without the experts interface"]
    if row.refused is not None:
        return row.family, "", "", "", "", f"refused: {_one_line(row.refused)}"
    if row.complaint is not None:
        notes.insert(0, f"**FAILED**: {_one_line(row.complaint)}")
    layers = "; ".join(f"{count} x {experts} experts" for experts, count in Counter(row.experts).items())
    return row.family, layers, row.layout, _number(row.error), _number(row.float32_error), ", ".join(notes)


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


if __name__ == "__main__":
    sys.exit(main())
