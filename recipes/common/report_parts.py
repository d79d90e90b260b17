"""Reports in parts: sections of tables, figures and text, and the files that they are written to."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bmoe_lightning.report import Grid, grid_json, grid_latex, grid_markdown, matplotlib_available, save_figure
from bmoe_lightning.report.files import jsonable
from bmoe_lightning.utils.atomic_io import write_text
from bmoe_lightning.utils.late_import import how_to_install

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPORT, RESULTS = "report.md", "results.json"
_NO_FIGURES = f"Figures are left out, since matplotlib is not installed; {how_to_install('plots')}."


@dataclass(frozen=True)
class NamedFigure:
    """A figure of a report.

    Attributes:
        name: Name of its file, without the extension.
        caption: Caption.
        draw: Draws it; needs matplotlib.
    """

    name: str
    caption: str
    draw: Callable[[], Figure]


@dataclass(frozen=True)
class Section:
    """A part of a report.

    Attributes:
        title: Title.
        grids: Tables, in Markdown and LaTeX files too.
        figures: Figures.
        linked_grids: Tables in files of their own, which the report only links.
        linked_figures: Figures that it only links.
        text: Paragraphs below, in Markdown.
        details: Further content of `results.json`, plain values; empty for none.
    """

    title: str
    grids: tuple[Grid, ...] = ()
    figures: tuple[NamedFigure, ...] = ()
    linked_grids: tuple[Grid, ...] = ()
    linked_figures: tuple[NamedFigure, ...] = ()
    text: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def all_grids(self) -> tuple[Grid, ...]:
        """All tables."""
        return self.grids + self.linked_grids

    @property
    def all_figures(self) -> tuple[NamedFigure, ...]:
        """All figures."""
        return self.figures + self.linked_figures


def write_sections(
    output: Path, title: str, introduction: str, sections: Sequence[Section], content: Mapping[str, Any]
) -> list[Path]:
    """Write a report; the same sections give the same bytes.

    The first file, `report.md`, is the text to print. Tables are in `tables`, in Markdown and LaTeX, and figures in
    `figures`, which need matplotlib. Tables and figures of an earlier report that this one does not have are removed.

    Args:
        output: Folder, created if missing.
        title: Title.
        introduction: Text below it, in Markdown.
        sections: The parts, in order.
        content: Content of `results.json` beside tables and details of the sections, in values that `jsonable` takes.

    Returns:
        The files, `report.md` first.
    """
    files = {REPORT: _markdown(title, introduction, sections)}
    for grid in (grid for section in sections for grid in section.all_grids):
        files[f"tables/{grid.name}.md"] = grid_markdown(grid)
        files[f"tables/{grid.name}.tex"] = grid_latex(grid)
    figures = [figure for section in sections for figure in section.all_figures] if matplotlib_available() else []
    names = [*files, *(f"figures/{figure.name}.png" for figure in figures)]
    stale = _listed(output / RESULTS) - set(names)
    for folder in ("tables", "figures"):
        (output / folder).mkdir(parents=True, exist_ok=True)
    for figure in figures:
        save_figure(figure.draw(), output / f"figures/{figure.name}.png")
    grids = [grid_json(grid) for section in sections for grid in section.all_grids]
    details = {key: value for section in sections for key, value in section.details.items()}
    results = {**jsonable({**content, "tables": grids, **details}), "files": names}
    for name, text in files.items():
        write_text(output / name, text)
    write_text(output / RESULTS, json.dumps(results, indent=2, allow_nan=False, ensure_ascii=False) + "\n")
    for name in stale:
        (output / name).unlink(missing_ok=True)
    return [output / name for name in (*names, RESULTS)]


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown.

    Args:
        head: Titles of the columns.
        rows: Cells of each row.
    """
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _markdown(title: str, introduction: str, sections: Sequence[Section]) -> str:
    parts = [f"# {title}", introduction]
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


def _listed(path: Path) -> set[str]:
    """Tables and figures that an earlier report wrote; none if its list cannot be read."""
    try:
        names = json.loads(path.read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return set()
    folders = ("tables", "figures")
    return {name for name in names if isinstance(name, str) and Path(name).parent in map(Path, folders)}
