"""README and docs say what is so: their code runs, their links lead somewhere, their commands exist."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tomllib
import types
from functools import cache
from pathlib import Path

import lightning as L
import pytest
import torch
from finetuner_cases import CALIBRATION, TEST, TRAIN, qwen
from serving_cases import data_of
from torch.utils.data import DataLoader
from toy import ANSWER_TOKENS, ToyData, toy_model

from bmoe_lightning import BayesianMoECallback
from bmoe_lightning.curvature import collect_factors
from bmoe_lightning.data import Splits
from bmoe_lightning.laplace import LaplacePosterior
from bmoe_lightning.methods import get_method, method_names

ROOT = Path(__file__).parents[1]
DOCS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
PAGES = [*DOCS, "README.md", "CONTRIBUTING.md", "SECURITY.md"]
MAX_WIDTH = 120
MAX_CODE_WIDTH = 88  # as docs/ruff.toml, which knows no comments

_BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>.*?) -->\n)?^```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_GENERATED = re.compile(r"^<!-- (.+?) -->$.*?^<!-- end of \1 -->$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(<?([^)\s>]+)>?\)")


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[tuple[int, str]]:
    """Line number and source of the Python blocks that are run."""
    text = text_of(page)
    return [
        (text.count("\n", 0, match.start("code")), match["code"])
        for match in _BLOCK.finditer(text)
        if match["reason"] is None
    ]


def code_of(page: str) -> list[str]:
    """All that is set as code: lines of fenced and indented blocks, and inline code."""
    text = re.sub(r"\\\n\s*", "", text_of(page))  # a command may go on on the next line
    lines = [line for fence in _FENCE.findall(text) for line in fence.splitlines()]
    prose = _FENCE.sub("", text)
    return lines + re.findall(r"^(?: {4}|\t)(.+)$", prose, re.MULTILINE) + re.findall(r"`([^`\n]+)`", prose)


# What a reader has: a module, data, a model.


class Questions(ToyData):
    """Examples with two or three choices."""

    def __getitem__(self, index):
        ids, label = self.ids[index], self.labels[index]
        present = torch.arange(len(ANSWER_TOKENS)) < (3 if label == 2 or index % 2 else 2)
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "choice_mask": present,
            "label": label,
            "index": torch.tensor(index),
        }


class Data(L.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(Questions(64, 1), batch_size=16, shuffle=True)

    def val_dataloader(self):
        return DataLoader(Questions(112, 2), batch_size=16)

    def test_dataloader(self):
        return DataLoader(Questions(32, 3), batch_size=16)

    predict_dataloader = test_dataloader


class YourModule(L.LightningModule):
    """Trains all parameters; its `class_logits` is what the docs add."""

    def __init__(self):
        super().__init__()
        self.model = toy_model()
        self.answer_token_ids = list(ANSWER_TOKENS)

    def training_step(self, batch, batch_idx):
        logits, labels = self.class_logits(batch)
        return torch.nn.functional.cross_entropy(logits, labels)

    def validation_step(self, batch, batch_idx):
        pass

    def test_step(self, batch, batch_idx):
        pass

    def predict_step(self, batch, batch_idx):
        return {"index": batch["index"]}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-2, momentum=0.9)


class MyModule(YourModule):
    def class_logits(self, batch):
        return class_logits(self.model, batch)


def class_logits(model, batch):
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    return logits[:, -1, list(ANSWER_TOKENS)], batch.get("label")


@pytest.fixture
def page_module(tmp_path, monkeypatch):
    """An empty module in which the blocks of a page run, in an empty folder."""
    from bmoe_lightning.data.protocols import registry as protocols
    from bmoe_lightning.methods import registry

    monkeypatch.chdir(tmp_path)
    # A page registers its method, for as long as it runs.
    monkeypatch.setattr(registry._METHODS, "_registered", dict(registry._METHODS._registered))
    monkeypatch.setattr(protocols._PROTOCOLS, "_registered", dict(protocols._PROTOCOLS._registered))
    page = types.ModuleType("page_of_the_docs")
    monkeypatch.setitem(sys.modules, page.__name__, page)
    model, data = toy_model(), Data()
    batches = list(data.train_dataloader())
    posterior = LaplacePosterior(collect_factors(model, class_logits, batches, rank=2))
    (tmp_path / "bayesian_moe").mkdir()
    posterior.save(tmp_path / "bayesian_moe" / "posterior.safetensors")
    qwen().save_pretrained(tmp_path / "model")
    data_of().tokenizer.save_pretrained(tmp_path / "model")
    vars(page).update(
        YourModule=YourModule,
        module=MyModule(),
        data=data,
        model=model,
        class_logits=class_logits,
        batch=batches[0],
        checkpoint="model",
        splits=Splits(TRAIN, CALIBRATION, TEST),
    )
    return page


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_code_runs(page, page_module):
    for line, code in blocks(page):
        # Empty lines in front, so that a traceback names the line of the page.
        exec(compile("\n" * line + code, page, "exec"), vars(page_module))


@pytest.mark.parametrize("page", PAGES)
def test_code_that_is_not_run_says_why(page):
    fences = re.findall(r"^```py", text_of(page), re.MULTILINE)
    found = list(_BLOCK.finditer(text_of(page)))
    assert len(found) == len(fences), "a Python block that is neither run nor marked"
    assert all(match["reason"] is None or match["reason"].strip() for match in found)


@pytest.mark.parametrize("page", PAGES)
def test_code_is_not_too_wide(page):
    wide = [line for _, code in blocks(page) for line in code.splitlines() if len(line) > MAX_CODE_WIDTH]
    assert not wide


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md"])
def test_prose_is_not_too_wide(page):
    prose = _GENERATED.sub("", _FENCE.sub("", text_of(page)))
    wide = [line for line in prose.splitlines() if len(line) > MAX_WIDTH and not line.startswith(("|", "    "))]
    assert not wide


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_lead_somewhere(page):
    folder = (ROOT / page).parent
    built = {(ROOT / "docs" / uri).resolve() for uri in (*hooks().PAGES, *hooks().FIGURES)}
    targets = [link.partition("#")[0] for link in _LINK.findall(text_of(page)) if not re.match(r"[a-z]+:", link)]
    missing = [t for t in targets if t and not (folder / t).exists() and (folder / t).resolve() not in built]
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_anchors_exist(page):
    for target, anchor in re.findall(r"\]\(([^)#\s]*\.md)?#([^)\s]+)\)", text_of(page)):
        headings = re.findall(r"^#+ (.+)$", ((ROOT / page).parent / target).read_text("utf-8"), re.MULTILINE)
        assert anchor in {re.sub(r"[^\w\s-]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist(page):
    text = "\n".join(code_of(page))
    targets = set(re.findall(r"^([a-z-]+):", text_of("Makefile"), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z][a-z-]*)", text)) <= targets
    modules = set(re.findall(r"(?<=-m )(?:recipes|bmoe_lightning)[\w.]*", text))
    assert not [name for name in modules if importlib.util.find_spec(name) is None]
    assert not [n for n in modules if (s := importlib.util.find_spec(n)).submodule_search_locations and not has_main(s)]


@pytest.mark.parametrize("page", PAGES)
def test_what_is_installed_comes_from_the_clone_with_tested_versions(page):
    extras = tomllib.loads(text_of("pyproject.toml"))["project"]["optional-dependencies"]
    for line in code_of(page):
        for arguments in re.findall(r"pip install ([^#]*)", line):
            [named] = re.findall(r"^-c constraints\.txt -e '\.\[([\w,-]+)\]'\s*$", arguments)
            assert set(named.split(",")) <= set(extras), line


def has_main(package) -> bool:
    return any((Path(place) / "__main__.py").is_file() for place in package.submodule_search_locations)


@pytest.mark.parametrize("page", PAGES)
def test_flags_exist(page):
    for line in code_of(page):
        for module, arguments in re.findall(r"-m (recipes[\w.]*)([^#|;&]*)", line):
            unknown = set(re.findall(r"(?<!\S)--[a-z][a-z-]*", arguments)) - flags_of(module)
            assert not unknown, line


@pytest.mark.filterwarnings("ignore")
def test_yaml_of_the_quick_start_makes_a_callback(tmp_path, monkeypatch):
    from lightning.pytorch.cli import LightningCLI

    [configuration] = re.findall(r"^```yaml\n(.*?)^```$", text_of("docs/index.md"), re.MULTILINE | re.DOTALL)
    (tmp_path / "config.yaml").write_text(configuration)
    monkeypatch.chdir(tmp_path)
    cli = LightningCLI(MyModule, Data, run=False, save_config_callback=None, args=["--config=config.yaml"])
    [callback] = [found for found in cli.trainer.callbacks if isinstance(found, BayesianMoECallback)]
    assert [method.name for method in callback.methods] == ["map", "lpo_probit"]
    assert callback.methods[1].link == "probit"
    assert callback.methods[1].curvature.rank == 20


@cache
def flags_of(module: str) -> set[str]:
    shown = subprocess.run(
        [sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    return set(re.findall(r"--[a-z][a-z-]*", shown.stdout))


@cache
def hooks() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("mkdocs_hooks", ROOT / "docs" / "mkdocs_hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_page_of_methods_has_every_method_with_its_options():
    page, overview = f"\n{hooks().methods_sections()}", hooks().methods_table()
    for name in method_names():
        method = get_method(name)
        assert overview.count(f"\n| `{name}` |") == 1
        section = page.partition(f"\n## {method.label}: `{name}` {{#{name}}}\n")[2].partition("\n## ")[0]
        assert section, name
        assert all(f"| `{option}` |" in section for option in method.options() if option != "label")
        assert method.source in section
        assert method.needs.describe() in section


def test_every_place_for_what_the_registries_say_is_in_its_page_once():
    for page, places in hooks().PLACES.items():
        text = text_of(f"docs/{page}")
        for place, make in places.items():
            assert text.count(f"<!-- {place} -->") == text.count(f"<!-- end of {place} -->") == 1
            assert make().strip()
        built = hooks().on_page_markdown(text, page_of(page), None, None)
        assert all(make() in built for make in places.values())
    with pytest.raises(ValueError, match=r"docs/methods\.md: there must be one place marked .*overview.*, found 0"):
        hooks().on_page_markdown("", page_of("methods.md"), None, None)
    assert hooks().on_page_markdown("as it is", page_of("index.md"), None, None) == "as it is"


def test_tables_in_the_pages_of_the_repository_are_those_of_the_registries(tmp_path, monkeypatch):
    (tmp_path / "docs").mkdir()
    for page in hooks().PLACES:
        text = text_of(f"docs/{page}")
        (tmp_path / "docs" / page).write_text(text.replace("|", ""), encoding="utf-8")
    monkeypatch.setattr(hooks(), "ROOT", tmp_path)
    hooks().fill_pages()
    for page, places in hooks().PLACES.items():
        filled = (tmp_path / "docs" / page).read_text(encoding="utf-8")
        for place in places:
            assert place_in(filled, place) == place_in(text_of(f"docs/{page}"), place), "run `make tables`"
    assert "| `openbookqa` |" in text_of("docs/tasks.md")


def place_in(text: str, place: str) -> str:
    return text.partition(f"<!-- {place} -->")[2].partition(f"<!-- end of {place} -->")[0]


def page_of(uri):
    return types.SimpleNamespace(file=types.SimpleNamespace(src_uri=uri))


def test_table_of_metrics_has_every_metric_and_the_page_of_results_explains_it():
    from bmoe_lightning.metrics import METRICS

    table = hooks().metrics_table().splitlines()
    page = text_of("docs/reading_the_results.md")
    words = {True: "higher", False: "lower", None: "neither"}
    for metric in METRICS:
        [row] = [line for line in table if f"| `{metric.name}` |" in line]
        assert metric.definition.replace("|", "\\|") in row
        assert f"| {words[metric.higher_is_better]} |" in row
    assert "| ACC | `acc` | 0 to 1 | higher |" in table[2]
    assert "| NLL calibration | `nll_calibration` | -∞ to ∞ | lower |" in "\n".join(table)
    explained = page.partition("## The four metrics")[2].partition("\n## The table")[0]
    names = ["ACC", "ECE", "NLL", "Brier", "NLL calibration and refinement", "Smooth ECE", "Adaptive ECE"]
    names += ["Classwise ECE", "AURC", "E-AURC", "AUGRC", "Coverage at 5 % risk", "AUROC, AUPR and FPR95"]
    names += ["Set size and set coverage"]
    for words in names:
        assert f"**{words}" in explained or f"| {words} |" in explained


def test_page_of_tasks_has_every_task_prompt_and_protocol_with_its_parts():
    from bmoe_lightning.data.prompts import PROMPT_NAMES
    from bmoe_lightning.data.protocols import get_protocol, protocol_names
    from bmoe_lightning.data.tasks import get_task, task_names

    tasks, parts = hooks().tasks_table().splitlines(), hooks().parts_table().splitlines()
    for task in map(get_task, task_names()):
        [row] = [line for line in tasks if f"| `{task.name}` |" in line]
        assert f"`{task.hub_id}`" in row
        assert all(f"`{config}`" in row for config in task.configs)
        for protocol in map(get_protocol, protocol_names()):
            [row] = [line for line in parts if line.startswith(f"| {task.label} | `{protocol.name}` |")]
            found = protocol.parts(task)
            assert row.endswith(f"| {task.split_names(found.test)[0]} |")
    assert all(f"| `{name}` |" in hooks().protocols_table() for name in protocol_names())
    assert all(f"| `{name}` |" in hooks().prompts_table() for name in PROMPT_NAMES)
    assert "Winogrande | `bayesadapt` | train | train of winogrande_xl that is not in winogrande_l | validation |" in (
        hooks().parts_table()
    )


def test_the_table_of_contributing_names_every_module_and_package():
    listed = text_of("CONTRIBUTING.md").partition("## Where things are")[2].partition("\n## ")[0]
    package = ROOT / "bmoe_lightning"
    found = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")} | {p.name for p in package.glob("*.py")}
    assert set(re.findall(r"`([\w.]+/?)`", listed.partition("\n`recipes/`")[0])) - {"bmoe_lightning/"} >= (
        found - {"__init__.py", "__main__.py"}
    )


def test_what_the_site_takes_from_the_repository_is_there():
    assert all(path.is_file() for path in (*hooks().PAGES.values(), *hooks().FIGURES.values()))


def test_every_page_is_in_the_navigation():
    navigation = text_of("mkdocs.yml").partition("\nnav:")[2].partition("\nmarkdown_extensions:")[0]
    assert [page for page in DOCS if f": {page.removeprefix('docs/')}\n" not in navigation] == []


def test_version_is_in_one_place():
    assert not re.search(r"^version\s*=\s*\"", text_of("pyproject.toml"), re.MULTILINE)
    assert 'version = { attr = "bmoe_lightning.__version__" }' in text_of("pyproject.toml")


def test_readme_is_short():
    assert len(text_of("README.md").splitlines()) <= 150
