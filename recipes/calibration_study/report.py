"""The tables of the study in markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from recipes.calibration_study.cases import CALIBRATED
from recipes.calibration_study.split_sizes import SplitRegret
from recipes.calibration_study.temperatures import Regret

GROUPS: Mapping[str, Callable[[str, str], bool]] = {
    "built-in task, normal fine-tunings": lambda task, kind: task == "built-in" and kind == "normal",
    "built-in task, other fine-tunings": lambda task, kind: task == "built-in" and kind not in ("normal", CALIBRATED),
    "models that are calibrated already": lambda _, kind: kind == CALIBRATED,
    "real questions": lambda task, _: task != "built-in",
}
"""Cases that one column or table is about, by task and kind."""


def temperature_tables(regrets: Sequence[Regret]) -> str:
    """`temperature_table` of the models that need a temperature, and of those that are calibrated already."""
    title = "regret with n labels"
    parts = {
        title: [regret for regret in regrets if regret.case.kind != CALIBRATED],
        f"{title}, {CALIBRATED}": [regret for regret in regrets if regret.case.kind == CALIBRATED],
    }
    return "\n\n".join(temperature_table(part, title) for title, part in parts.items() if part)


def temperature_table(regrets: Sequence[Regret], title: str = "regret with n labels") -> str:
    """Mean and worst regret of each rule for the temperature, by number of labels."""
    counts = sorted({regret.num_labels for regret in regrets})
    head = [title, *map(str, counts)]
    rows = []
    for rule in dict.fromkeys(regret.rule for regret in regrets):
        values = {n: [r.value for r in regrets if r.rule == rule and r.num_labels == n] for n in counts}
        rows.append([rule, *(_cell(values[n]) for n in counts)])
    cases = {(r.case.task, r.case.kind, r.case.seed) for r in regrets}
    return _table(head, rows) + f"\n\n{_described(cases)}"


def split_tables(regrets: Sequence[SplitRegret], labels: Mapping[str, str]) -> str:
    """Mean and worst regret of each method by size of the calibration split: one table a group of cases."""
    parts = []
    for group, belongs in GROUPS.items():
        chosen = [regret for regret in regrets if belongs(regret.task, regret.kind)]
        if not chosen:
            continue
        sizes = list(dict.fromkeys(regret.size for regret in chosen))
        head = [f"regret on {group}", *("all" if size is None else str(size) for size in sizes)]
        rows = []
        for method, label in labels.items():
            values = {size: [r.value for r in chosen if r.method == method and r.size == size] for size in sizes}
            rows.append([label, *(_cell(values[size]) for size in sizes)])
        cases = {(r.task, r.kind, r.seed) for r in chosen}
        parts.append(_table(head, rows) + f"\n\n{_described(cases)}")
    return "\n\n".join(parts)


def _cell(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not known:
        return "refused"
    return f"{_number(sum(known) / len(known))} ({_number(max(known))})"


def _number(value: float) -> str:
    rounded = round(value)
    return f"{rounded if rounded else 0:,}".replace(",", " ").replace("-", "\N{MINUS SIGN}")


def _described(cases: set[tuple[str, str, int]]) -> str:
    counts: dict[str, int] = {}
    for task, kind, _ in sorted(cases):
        name = f"{task}, {kind}"
        counts[name] = counts.get(name, 0) + 1
    listed = "; ".join(f"{name}: {count}" for name, count in counts.items())
    return f"{len(cases)} fine-tuning{'s' * (len(cases) > 1)} ({listed})."


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
