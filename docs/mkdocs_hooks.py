"""What MkDocs builds from the code and the repository: tables of methods, tasks and protocols, changelog, figures.

Nothing here is written by hand twice: the tables come from the registries each time the site is built. Those that fit
are in the pages of the repository too, for readers without the site; `make tables` writes them again.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import TYPE_CHECKING

from recipes.common.readme import between, fill

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
    """Put what the registries say into the pages that have places for it."""
    for place, make in PLACES.get(page.file.src_uri, {}).items():
        try:
            markdown = between(markdown, place, make())
        except ValueError as error:
            raise ValueError(f"docs/{page.file.src_uri}: {error}") from None
    return markdown


def fill_pages() -> None:
    """Write the tables that the pages of the repository have, too."""
    for page, places in PLACES.items():
        for place, make in places.items():
            if place not in SITE_ONLY:
                fill(ROOT / "docs" / page, place, make())


def methods_table() -> str:
    """An overview of all registered methods."""
    rows = [
        [f"`{method.name}`", _cell(_summary(method)), _cell(_needs(method))]
        for method in _methods()
    ]
    return _table("name | what it does | needs besides the model", rows)


def methods_sections() -> str:
    """A section for each registered method, with its options."""
    return "\n\n".join(map(_section, _methods()))


def _methods() -> list[Method]:
    from bmoe_lightning.methods import get_method, method_names

    return [get_method(name) for name in method_names()]


def metrics_table() -> str:
    """All metrics of the registry with range, direction, class and definition."""
    from bmoe_lightning.metrics import METRICS, Binning

    rows = []
    words = {True: "higher", False: "lower", None: "neither"}
    for metric in METRICS:
        better = words[metric.higher_is_better]
        kind = type(metric.torchmetric(Binning())).__name__
        span = f"{_bound(metric.lower)} to {_bound(metric.upper)}"
        definition = _cell(metric.definition)
        rows.append(
            [metric.title, f"`{metric.name}`", span, better, definition, f"`{kind}`"]
        )
    return _table("metric | `name` | range | better | definition | class", rows)


def _bound(value: float) -> str:
    return f"{value:g}".replace("inf", "∞")


def tasks_table() -> str:
    """All registered tasks with their hub id, configurations and splits."""
    from bmoe_lightning.data.tasks import get_task, task_names

    rows = []
    for task in map(get_task, task_names()):
        configs = [task.default_config] if task.default_config else task.configs
        validation = task.validation_splits[:1] or ("a part of train",)
        rows.append(
            [
                f"[{task.label}]({task.url})",
                f"`{task.name}`",
                f"`{task.hub_id}`",
                ", ".join(f"`{config}`" for config in configs),
                task.train_splits[0],
                validation[0],
                task.test_splits[0],
            ]
        )
    head = "data set | task | hub id | configurations | train | validation | reported"
    return _table(head, rows)


def prompts_table() -> str:
    """All prompt formats with an example."""
    from bmoe_lightning.data import Question
    from bmoe_lightning.data.prompts import PROMPT_NAMES, get_prompt_format

    lettered = Question("q", "Which floats?", ("a nail", "a cork"), 1)
    boolean = Question("q", "do corks float", ("False", "True"), 1, "Cork is light.")
    rows = []
    for name in PROMPT_NAMES:
        prompt = get_prompt_format(name)
        question = next(q for q in (lettered, boolean) if prompt.applies(q))
        lines = prompt.render(question).replace("\n", "` `")
        answers = ", ".join(f"`{answer}`" for answer in prompt.answers(question))
        rows.append([f"`{name}`", f"`{lines}`", answers])
    return _table("format | a prompt | answers", rows)


def protocols_table() -> str:
    """All registered protocols with what they do."""
    from bmoe_lightning.data.protocols import get_protocol, protocol_names

    rows = []
    for protocol in map(get_protocol, protocol_names()):
        kind = type(protocol)
        label = (
            f"[{protocol.label}]({protocol.url})" if protocol.url else protocol.label
        )
        text = re.split(r"\n\nAttributes:", inspect.getdoc(kind) or "")[0]
        rows.append([f"`{protocol.name}`", label, _cell(text.replace("\n\n", " "))])
    return _table("protocol | of | what it does", rows)


def parts_table() -> str:
    """The parts of each task under each protocol, by the names of the data's splits."""
    from bmoe_lightning.data.protocols import get_protocol, protocol_names
    from bmoe_lightning.data.tasks import get_task, task_names

    rows = []
    for task in map(get_task, task_names()):
        for protocol in map(get_protocol, protocol_names()):
            parts = protocol.parts(task)
            calibration = parts.describe_calibration()
            if parts.otherwise is not None and not task.validation_splits:
                calibration = parts.otherwise.describe()
            rows.append(
                [
                    task.label,
                    f"`{protocol.name}`",
                    task.split_names(parts.train)[0],
                    calibration,
                    task.split_names(parts.test)[0],
                ]
            )
    return _table("data set | protocol | train | calibration | reported", rows)


def _table(head: str, rows: list[list[str]]) -> str:
    lines = [f"| {head} |", "|" + " --- |" * len(rows[0])]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


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


# What goes into the places of each page, which are marked by name.
PLACES = {
    "metrics.md": {"metrics": metrics_table},
    "methods.md": {"overview": methods_table, "methods": methods_sections},
    "tasks.md": {
        "tasks": tasks_table,
        "prompts": prompts_table,
        "protocols": protocols_table,
        "parts": parts_table,
    },
}
# Too long for the pages of the repository.
SITE_ONLY = {"methods"}


if __name__ == "__main__":
    fill_pages()
