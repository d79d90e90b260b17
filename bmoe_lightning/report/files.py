"""Output files of a comparison: `results.json`, `results.csv`, `results.md` and `predictions.jsonl`."""

from __future__ import annotations

import csv
import io
import json
import math
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from bmoe_lightning.report.results import MethodResult, Row, by_method, seed_values
from bmoe_lightning.report.table import results_markdown
from bmoe_lightning.utils.atomic_io import write_text

_PACKAGES = ("torch", "lightning", "transformers", "torchmetrics", "bmoe-lightning")


def library_versions(packages: Sequence[str] = _PACKAGES) -> dict[str, str]:
    """Versions of Python and of the libraries that the results depend on; "not installed" for missing ones.

    Args:
        packages: Names on PyPI.
    """
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package.replace("-", "_")] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package.replace("-", "_")] = "not installed"
    return versions


def write_results(
    output_dir: str | Path,
    results: Sequence[MethodResult],
    rows: Sequence[Row],
    *,
    config: Mapping[str, Any],
    versions: Mapping[str, str] | None = None,
    details: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
) -> dict[str, Path]:
    """Write everything that is needed to check or reproduce the comparison.

    JSON has no infinity: a number that is not finite is written as the string `inf`, `-inf` or `nan`, and a
    log-probability of `-inf`, that of an absent class, as null.

    Args:
        output_dir: Folder, created if missing; files of the same names are replaced.
        results: What the rows were made from.
        rows: From `summarise`.
        config: Settings of the run; plain values, lists, dictionaries and paths.
        versions: Versions of the libraries; `library_versions` if None.
        details: Further entries of `results.json`, such as properties of the fits, which no single method owns.
        notes: Sentences below the tables of `results.md`.

    Returns:
        The paths by file name.

    Raises:
        TypeError: If a value of `config` or `details` is not JSON serialisable.
        ValueError: If results and rows do not match, or the results cannot be compared; see `by_method`.
    """
    check_rows_match(results, rows)
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        "results.json": _results_json(
            results, rows, config, library_versions() if versions is None else versions, details or {}
        ),
        "results.csv": _results_csv(rows),
        "results.md": results_markdown(rows, notes),
        "predictions.jsonl": _predictions_jsonl(results),
    }
    for name, text in contents.items():
        write_text(folder / name, text)
    return {name: folder / name for name in contents}


def check_rows_match(results: Sequence[MethodResult], rows: Sequence[Row]) -> None:
    """Refuse rows that were not made from these results.

    Args:
        results: Predictions.
        rows: From `summarise`.

    Raises:
        ValueError: If methods or seeds differ, or the results cannot be compared; see `by_method`.
    """
    present = {method: tuple(result.seed for result in group) for method, group in by_method(results).items()}
    shown = {row.method: row.seeds for row in rows}
    if present != shown:
        raise ValueError(f"the rows show {shown}, but the results hold {present}; call summarise on these results")


def _results_json(
    results: Sequence[MethodResult],
    rows: Sequence[Row],
    config: Mapping[str, Any],
    versions: Mapping[str, str],
    details: Mapping[str, Any],
) -> str:
    settings = rows[0].settings
    content = {
        **jsonable(details),
        "ece_convention": settings.ece_convention(),
        "interval": settings.interval(),
        "num_examples": rows[0].num_examples,
        "config": jsonable(config),
        "versions": dict(versions),
        "rows": [
            {
                "method": row.method,
                "label": row.label,
                "seeds": list(row.seeds),
                **{
                    name: jsonable({"mean": m.mean, "std": m.std, "low": m.low, "high": m.high})
                    for name, m in row.metrics.items()
                },
                "extra": jsonable(row.extra),
                "hyperparameters": jsonable(row.hyperparameters),
                "warnings": list(row.warnings),
            }
            for row in rows
        ],
        "runs": [
            {
                "method": result.method,
                "seed": result.seed,
                **jsonable(seed_values(result, settings)),
                "extra": jsonable(result.extra),
                "warnings": list(result.warnings),
            }
            for result in results
        ],
    }
    return json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def jsonable(value: Any) -> Any:
    """A value as JSON has it: numbers that are not finite as the strings `inf`, `-inf` and `nan`, paths as text.

    Args:
        value: Nested mappings, lists and tuples of plain values.
    """
    if isinstance(value, Mapping):
        return {str(key): jsonable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(inner) for inner in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _results_csv(rows: Sequence[Row]) -> str:
    extra_names = list(dict.fromkeys(name for row in rows for name in row.extra))
    parts = ("mean", "std", "low", "high")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [metric.name for metric in rows[0].settings.metrics]
    columns = [f"{name}_{part}" for name in names for part in parts]
    writer.writerow(["method", "label", "num_seeds", "num_examples", *columns, *extra_names])
    for row in rows:
        numbers = [getattr(row.metrics[name], part) for name in names for part in parts]
        extra = [row.extra.get(name) for name in extra_names]
        writer.writerow([row.method, row.label, len(row.seeds), row.num_examples, *numbers, *extra])
    return text.getvalue()


def _predictions_jsonl(results: Sequence[MethodResult]) -> str:
    lines = []
    for result in results:
        for item, label, log_probs in zip(result.ids, result.target.tolist(), result.log_probs.tolist(), strict=True):
            line = {
                "id": item,
                "method": result.method,
                "seed": result.seed,
                "label": label,
                "log_probs": [value if math.isfinite(value) else None for value in log_probs],
            }
            lines.append(json.dumps(line, allow_nan=False, ensure_ascii=False))
    return "\n".join(lines) + "\n"
