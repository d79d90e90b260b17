"""Tables and numbers of a plan as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_GIB = 2**30
_MIB = 2**20


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of an aligned table: the first column left-aligned, the others right-aligned."""
    lines = [list(header), *map(list, rows)]
    numeric = [
        all(line[i][:1].isdigit() or not line[i] or line[i] in ("yes", "no") for line in lines[1:])
        for i in range(len(header))
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]

    def text(line: Sequence[str]) -> str:
        cells = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        )
        return "  ".join(cells).rstrip()

    return [text(lines[0]), "  ".join("-" * width for width in widths), *map(text, lines[1:])]


def billions(count: int) -> str:
    """A number of parameters in billions."""
    return f"{count / 1e9:.3f}" if count >= 1e6 else f"{count / 1e9:.6f}"


def percent(part: int, whole: int) -> str:
    """A share in percent."""
    return f"{part / whole:.1%}"


def mib(size: int) -> str:
    """Bytes in MiB."""
    return f"{size / _MIB:,.1f}" if size < 100 * _MIB else f"{size / _MIB:,.0f}"


def gib(size: int) -> str:
    """Bytes in GiB."""
    return f"{size / _GIB:.2f}" if size < 10 * _GIB else f"{size / _GIB:.1f}"


def count(number: int, one: str, many: str) -> str:
    """A number with its noun."""
    return f"{number} {one if number == 1 else many}"
