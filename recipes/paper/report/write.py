"""The files of a report: `report.md`, `results.json`, and a file for each table and figure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bmoe_lightning.report import (
    SummarySettings,
    grid_json,
    grid_latex,
    grid_markdown,
    matplotlib_available,
    save_figure,
)
from bmoe_lightning.report.files import jsonable
from bmoe_lightning.utils.atomic_io import write_text
from recipes.paper.outcomes import Study
from recipes.paper.report.compared import Compared, read_compared
from recipes.paper.report.costs import Costs
from recipes.paper.report.published import Published, read_published
from recipes.paper.report.section import ReportInput, Section
from recipes.paper.report.sections import SECTIONS

REPORT, RESULTS = "report.md", "results.json"
_NO_FIGURES = "Figures are left out, since matplotlib is not installed; pip install 'bmoe-lightning[plots]'."


def write_report(
    output: Path,
    study: Study,
    *,
    costs: Costs | None = None,
    settings: SummarySettings | None = None,
    compared: Compared | None = None,
    published: Published | None = None,
) -> list[Path]:
    """Write the report of a study; the same study gives the same bytes.

    The first file, `report.md`, is the text to print. Tables are in `tables`, in Markdown and LaTeX, and figures in
    `figures`, which need matplotlib. Tables and figures of an earlier report that this one does not have are removed.

    Args:
        output: Folder, created if missing.
        study: Outcomes.
        costs: Costs of the rows; None if they were not measured.
        settings: ECE convention and bootstrap; defaults if None.
        compared: Methods that are known by name, and claims; those of `compared.yaml` if None.
        published: Numbers of a publication; those of `published.json` if None.

    Returns:
        The files, `report.md` first.

    Raises:
        ValueError: If the study has no outcomes, or results cannot be compared; see `by_method`.
    """
    if not study.outcomes:
        raise ValueError("the study has no outcomes to report; run it first")
    report = ReportInput(
        study=study,
        compared=read_compared() if compared is None else compared,
        published=read_published() if published is None else published,
        costs=costs,
        settings=settings or SummarySettings(),
    )
    sections = [section for make in SECTIONS if (section := make(report)) is not None]
    files = _texts(report, sections)
    figures = [figure for section in sections for figure in section.all_figures] if matplotlib_available() else []
    names = [*files, *(f"figures/{figure.name}.png" for figure in figures)]
    stale = _listed(output / RESULTS) - set(names)
    for folder in ("tables", "figures"):
        (output / folder).mkdir(parents=True, exist_ok=True)
    for figure in figures:
        save_figure(figure.draw(), output / f"figures/{figure.name}.png")
    results = {**_results(report, sections), "files": names}
    for name, text in files.items():
        write_text(output / name, text)
    write_text(output / RESULTS, json.dumps(results, indent=2, allow_nan=False, ensure_ascii=False) + "\n")
    for name in stale:
        (output / name).unlink(missing_ok=True)
    return [output / name for name in (*names, RESULTS)]


def _texts(report: ReportInput, sections: Sequence[Section]) -> dict[str, str]:
    files = {REPORT: _markdown(report, sections)}
    for grid in (grid for section in sections for grid in section.all_grids):
        files[f"tables/{grid.name}.md"] = grid_markdown(grid)
        files[f"tables/{grid.name}.tex"] = grid_latex(grid)
    return files


def _markdown(report: ReportInput, sections: Sequence[Section]) -> str:
    study = report.study
    parts = [
        f"# Results: {study.model}",
        f"Preset `{study.preset}`. {_conventions(report)}",
    ]
    for section in sections:
        parts += [f"## {section.title}", *_contents(section), *section.text]
    return "\n\n".join(parts) + "\n"


def _contents(section: Section) -> list[str]:
    parts = [grid_markdown(grid).rstrip() for grid in section.grids]
    links = [f"- [{grid.caption}](tables/{grid.name}.md)" for grid in section.linked_grids]
    if matplotlib_available():
        parts += [f"![{figure.caption}](figures/{figure.name}.png)\n\n{figure.caption}" for figure in section.figures]
        links += [f"- [{figure.caption}](figures/{figure.name}.png)" for figure in section.linked_figures]
    elif section.all_figures:
        parts.append(_NO_FIGURES)
    return [*parts, "\n".join(links)] if links else parts


def _conventions(report: ReportInput) -> str:
    settings = report.settings
    return (
        "±: standard deviation over seeds (n - 1). **Bold**: best of a column, <u>underlined</u>: second best, as "
        f"printed. NLL in nats. ECE: {settings.ece_convention()}."
    )


def _results(report: ReportInput, sections: Sequence[Section]) -> dict[str, Any]:
    study, settings = report.study, report.settings
    details = {key: value for section in sections for key, value in section.details.items()}
    content: dict[str, Any] = jsonable(
        {
            "preset": study.preset,
            "model": study.model,
            "home": study.home,
            "data": study.labels,
            "ece_convention": settings.ece_convention(),
            "num_resamples": settings.num_samples,
            "level": settings.level,
            "bootstrap_seed": settings.bootstrap_seed,
            "tables": [grid_json(grid) for section in sections for grid in section.all_grids],
            **details,
        }
    )
    return content


def _listed(path: Path) -> set[str]:
    """Tables and figures that an earlier report wrote; none if its list cannot be read."""
    try:
        names = json.loads(path.read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return set()
    folders = ("tables", "figures")
    return {name for name in names if isinstance(name, str) and Path(name).parent in map(Path, folders)}
