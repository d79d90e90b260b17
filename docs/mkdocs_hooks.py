"""What MkDocs builds from the code and the repository: the page of methods, the changelog, the figures.

Nothing here is written by hand twice: the page of methods comes from the registry each time the site is built.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

    from bmoe_lightning.methods import Method

ROOT = Path(__file__).parents[1]

# Files of the repository that are pages of the site too.
PAGES = {
    "changelog.md": ROOT / "CHANGELOG.md",
    "contributing.md": ROOT / "CONTRIBUTING.md",
}

FIGURES = {
    f"figures/{name}.png": ROOT / "recipes" / "figures" / f"{name}.png"
    for name in ("reliability", "label_budget")
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add pages and figures that live elsewhere in the repository."""
    from mkdocs.structure.files import File

    for uri, path in PAGES.items():
        text = path.read_text(encoding="utf-8")
        files.append(File.generated(config, uri, content=text.replace("](docs/", "](")))
    for uri, path in FIGURES.items():
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(
    markdown: str,
    page: Page,
    config: MkDocsConfig,  # noqa: ARG001
    files: Files,  # noqa: ARG001
) -> str:
    """Put the registry's methods into the page that has a place for them."""
    if page.file.src_uri != "methods.md":
        return markdown
    pattern = re.compile(r"<!-- methods -->.*?<!-- end of methods -->", re.DOTALL)
    text, count = pattern.subn(lambda _: methods_page(), markdown)
    if count != 1:
        raise ValueError(
            f"docs/methods.md must have one place marked 'methods', found {count}"
        )
    return text


def methods_page() -> str:
    """An overview of all registered methods, then a section for each."""
    from bmoe_lightning.methods import get_method, method_names

    methods = [get_method(name) for name in method_names()]
    overview = [
        "| name | what it does | needs besides the model |",
        "| --- | --- | --- |",
    ]
    overview += [
        f"| [`{method.name}`](#{method.name}) | {_cell(_summary(method))} | {_cell(_needs(method))} |"
        for method in methods
    ]
    return "\n\n".join(["\n".join(overview), *(_section(method) for method in methods)])


def _section(method: Method) -> str:
    kind = type(method)
    facts = [
        f"**Needs** {_needs(method)}.",
        f"**A prediction costs** {method.cost}.",
        f"**Class** `{kind.__module__}.{kind.__qualname__}`.",
    ]
    if method.source:
        facts.append(f"**Source** <{method.source}>.")
    parts = [
        f"## {method.label}: `{method.name}` {{#{method.name}}}",
        _description(method),
        "  \n".join(facts),
    ]
    return "\n\n".join([*parts, *_options(kind)])


def _options(kind: type[Method]) -> list[str]:
    """A table of the options that not every method has."""
    rows = []
    for entry in dataclasses.fields(kind):
        if entry.name in ("name", "label"):
            continue
        text = _cell(entry.metadata.get("help", ""))
        note = " *Prediction only.*" if entry.metadata.get("prediction_only") else ""
        rows.append(f"| `{entry.name}` | {_default(entry.default)} | {text}{note} |")
    head = ["| option | default | what it is |", "| --- | --- | --- |"]
    return ["\n".join([*head, *rows])] if rows else []


def _default(value: object) -> str:
    """A default as code; of an object with all its own defaults only the class."""
    plain = dataclasses.is_dataclass(value) and value == type(value)()
    return _cell(f"`{type(value).__name__}()`" if plain else f"`{value!r}`")


def _description(method: Method) -> str:
    """The docstring up to its first section."""
    text = inspect.getdoc(type(method)) or ""
    return re.split(r"\n\n(?:Attributes|Args|Raises|Example|Note)s?:", text)[0].strip()


def _summary(method: Method) -> str:
    return _description(method).split("\n\n")[0].replace("\n", " ")


def _needs(method: Method) -> str:
    parts = [method.needs.describe()]
    if any(
        curvature.collects
        for curvature in method.with_defaults(_default_curvature()).curvatures
    ):
        parts.insert(0, "a curvature pass over the training data")
    return ", ".join(part for part in parts if part) or "nothing"


def _default_curvature() -> object:
    from bmoe_lightning.curvature import Curvature

    return Curvature()


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
