"""Warnings that differ in numbers alone, which tables and reports tell once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_PARTICULARS = re.compile(r"\([^()]*\)|-?\d+(\.\d+)?(e[+-]?\d+)?")  # of one fit: numbers, and what stands in brackets
_SEEDS = re.compile(r"seeds? ([\d, ]+): ")


def without_particulars(sentence: str) -> str:
    """A warning without what is of one fit: the same for fits that are warned of for the same reason.

    Args:
        sentence: The warning.
    """
    return _PARTICULARS.sub("", _split(sentence)[1])


def alike(sentences: Iterable[str]) -> list[list[str]]:
    """Distinct warnings, those together that differ in numbers alone.

    Args:
        sentences: The warnings.
    """
    found: dict[str, list[str]] = {}
    for sentence in dict.fromkeys(sentences):
        found.setdefault(without_particulars(sentence), []).append(sentence)
    return list(found.values())


def told_once(sentences: Sequence[str]) -> str:
    """One sentence for warnings that are alike, with the numbers of the first and the seeds of all.

    Args:
        sentences: The warnings, at least one.
    """
    if len(sentences) == 1:
        return sentences[0]
    parts = [_split(sentence) for sentence in sentences]
    seeds = sorted(set().union(*(of for of, _ in parts)))
    start = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}: " if all(of for of, _ in parts) else ""
    return f"{start}{parts[0][1]} (the numbers are those of the first)"


def _split(sentence: str) -> tuple[set[int], str]:
    """The seeds that a warning begins with, none if it is of all, and the rest."""
    found = _SEEDS.match(sentence)
    if found is None:
        return set(), sentence
    return {int(seed) for seed in found[1].split(",")}, sentence[found.end() :]
