"""Command lines and YAML files of the recipes: one way to read them, and a list of all their options."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Literal

import pytest

from recipes.common.cli import UsageError, command, option, option_lines, parse

ROOT = Path(__file__).parents[3]
FROZEN = Path(__file__).with_name("options.txt")
RECIPES = {
    "recipes.qwen_obqa": ("recipes.qwen_obqa.settings", "Settings"),
    "recipes.benchmark": ("recipes.benchmark.settings", "BenchmarkSettings"),
    "recipes.plan": ("recipes.plan.settings", "PlanSettings"),
    "recipes.calibration_study": ("recipes.calibration_study.settings", "StudySettings"),
    "recipes.supported_models": ("recipes.supported_models.settings", "SurveySettings"),
    "recipes.paper": ("recipes.paper.settings", "PaperSettings"),
    "recipes.routers": ("recipes.routers.settings", "RouterSettings"),
    "recipes.generation": ("recipes.generation.settings", "GenerationSettings"),
    "recipes.faults": ("recipes.faults.settings", "FaultSettings"),
    "recipes.upcycle": ("recipes.upcycle.settings", "UpcycleSettings"),
    "recipes.common.readme": ("recipes.common.readme", "ReadmeSettings"),
}


@dataclass(frozen=True)
class Inner:
    depth: int = option(1, "depth", least=0)


@dataclass(frozen=True)
class Example:
    model: str = option(help="100 % needed")
    rate: float | None = option(None, "rate")
    kind: Literal["one", "two"] = option("one", "kind")
    quick_look: bool = option(False, "quick")
    sizes: tuple[float, ...] = option((1.0,), "sizes")
    names: tuple[str, ...] = option((), "names", repeat=True)
    parts: tuple[str | dict, ...] = option(("a",), "parts")
    limit: int | None = option(None, "limit", least=1)
    inner: Inner = option(Inner(), "")


def options_of(recipe):
    module, name = RECIPES[recipe]
    return getattr(importlib.import_module(module), name)


def leaves(options):
    for entry in fields(options):
        yield from leaves(type(entry.default)) if is_dataclass(entry.default) else [entry]


def read(*arguments):
    return parse(Example, arguments, program="python -m example", description="What it does.")


def of_file(tmp_path, text, *arguments):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    return read("--model", "m", "--config", str(file), *arguments)


def test_defaults():
    assert read("--model", "m") == Example("m")


def test_flags():
    found = read("--model", "m", "--rate", "1e-4", "--kind", "two", "--quick-look", "--sizes", "2,3", "--limit", "7",
                 "--names", "x=1", "--names", "y=2,3", "--parts", "a,b:C", "--inner.depth", "4")  # fmt: skip
    assert found == Example("m", 1e-4, "two", True, (2.0, 3.0), ("x=1", "y=2,3"), ("a", "b:C"), 7, Inner(4))


def test_a_file_wins_over_defaults_and_flags_over_the_file(tmp_path):
    text = "rate: 5e-5\nquick-look: true\nlimit: null\nsizes: [4, 5]\nnames: [x=1]\ninner: {depth: 2}\nkind: two\n"
    text += "parts: [a, {class_path: b.C, init_args: {rank: 3}}]\n"
    found = of_file(tmp_path, text, "--kind", "one", "--sizes", "6", "--names", "y=2", "--no-quick-look")
    parts = ("a", {"class_path": "b.C", "init_args": {"rank": 3}})
    assert found == Example("m", 5e-5, "one", False, (6.0,), ("x=1", "y=2"), parts, None, Inner(2))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("", "--model must be given"),
        ("--model m --limt 3", "unknown option --limt, did you mean --limit?; --help lists all"),
        ("--model m --lim 3", "unknown option --lim, did you mean --limit?; --help lists all"),
        ("--model m --inner.dept=3", "unknown option --inner.dept, did you mean --inner.depth?; --help lists all"),
        ("--model m --no-such-thing", "unknown option --no-such-thing; --help lists all"),
        ("--model m extra", "unexpected argument 'extra'; options begin with --, and --help lists them"),
        ("--model m --limit few", "--limit must be an integer, got few"),
        ("--model m --rate fast", "--rate must be a number, got fast"),
        ("--model m --kind three", "--kind must be one of one, two, got three"),
        ("--model m --sizes 1,big", "each value of --sizes must be a number, got big"),
        ("--model m --limit 0", "--limit must be at least 1, got 0"),
        ("--model m --inner.depth -1", "--inner.depth must be at least 0, got -1"),
        ("--model m --limit", "argument --limit: expected one argument"),
    ],
)
def test_wrong_flags_have_one_sentence(arguments, sentence):
    with pytest.raises(UsageError) as found:
        read(*arguments.split())
    assert str(found.value) == sentence


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("quick_lok: true", "unknown option --quick-lok, did you mean --quick-look?; --help lists all"),
        ("inner: {dept: 1}", "unknown option --inner.dept, did you mean --inner.depth?; --help lists all"),
        ("limit: four", "--limit must be an integer, got four"),
        ("limit: true", "--limit must be an integer, got True"),
        ("quick_look: 1", "--quick-look must be true or false, got 1"),
        ("sizes: {a: 1}", "--sizes must be a list, got {'a': 1}"),
        ("parts: [a, 3]", "each value of --parts must be text or a mapping, got 3"),
        ("names: {a: 1}", "--names must be a list, got {'a': 1}"),
        ("- rate", "--config must name a file of `option: value` lines, found '- rate'"),
    ],
)
def test_wrong_files_have_one_sentence(tmp_path, text, sentence):
    with pytest.raises(UsageError) as found:
        of_file(tmp_path, text)
    assert str(found.value) == sentence


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UsageError, match=r"^--config: .*nowhere\.yaml"):
        read("--config", "nowhere.yaml")
    with pytest.raises(UsageError, match=r"^Problems parsing config: [^\n]*$"):
        of_file(tmp_path, "a: [")


def test_command_ends_in_one_sentence_and_2(monkeypatch, capsys):
    @command
    def main(arguments):
        return len(read(*arguments).model)

    assert main(["--model", "abc"]) == 3
    assert main(["--model"]) == 2
    assert capsys.readouterr().err == "error: argument --model: expected one argument\n"
    monkeypatch.setattr(sys, "argv", ["example", "--model", "ab"])
    assert main() == 2
    assert capsys.readouterr() == ("", "")


def test_the_configuration_that_is_printed_can_be_read(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        read("--model", "m", "--sizes", "2,3", "--inner.depth", "4", "--names", "x=1", "--print-config")
    assert stopped.value.code == 0
    assert of_file(tmp_path, capsys.readouterr().out) == Example("m", sizes=(2.0, 3.0), names=("x=1",), inner=Inner(4))


@pytest.mark.parametrize("recipe", RECIPES)
def test_options_are_the_frozen_ones(recipe):
    sections = FROZEN.read_text(encoding="utf-8").strip().split("\n\n")
    frozen = {section.splitlines()[0]: section.splitlines()[1:] for section in sections}
    found = option_lines(options_of(recipe))
    listing = "\n".join([recipe, *found])
    assert frozen[recipe] == found, f"put this into {FROZEN.name} if the change is meant:\n{listing}"


@pytest.mark.parametrize("recipe", RECIPES)
def test_help_names_every_option_without_torch(recipe):
    options = options_of(recipe)
    main = recipe if recipe.startswith("recipes.common") else f"{recipe}.__main__"
    code = (
        f"import sys\nfrom {main} import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    for entry, line in zip(leaves(options), option_lines(options), strict=True):
        flag, kind = line.split("  ")
        assert f"  {flag}" in done.stdout
        assert entry.metadata["help"]
        if kind.startswith("tuple["):  # whether it takes several values is seen without reading on
            several = re.search(rf"^  {flag} (\S+)", done.stdout, re.MULTILINE)[1].endswith(",...")
            assert several != entry.metadata["repeat"]
            assert ("separated by commas" if several else "may be repeated") in entry.metadata["help"]
