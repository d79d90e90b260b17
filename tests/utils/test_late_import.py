"""A torchvision that cannot be loaded is named, whichever library trips over it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from bmoe_lightning.utils.late_import import how_to_install, late_import, raise_for_torchvision

ROOT = Path(__file__).parents[2]


@pytest.fixture
def broken(tmp_path):
    """A folder whose torchvision fails as one for another build of torch does."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text('raise RuntimeError("operator torchvision::nms does not exist")\n')
    info = tmp_path / "torchvision-0.28.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.28.0\n")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}


def run(environment, *arguments):
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stderr.strip().splitlines()[-1]


def test_public_names_say_it(broken):
    code, last = run(broken, "-c", "from bmoe_lightning import BayesianMoECallback")
    assert code == 1
    assert last.startswith("ImportError: torchvision 0.28.0 and torch 2.")
    assert "operator torchvision::nms does not exist" in last
    assert "Uninstall torchvision" in last


def test_recipes_say_it_in_one_line(broken):
    code, last = run(broken, "-m", "recipes.plan", "--model", "qwen1.5-moe-a2.7b")
    assert code == 1
    assert last.startswith("error: torchvision 0.28.0 and torch 2.")


def test_a_posterior_is_imported_beside_it(broken):
    code, last = run(
        broken, "-c", "import sys; from bmoe_lightning import LaplacePosterior; print('done', file=sys.stderr)"
    )
    assert (code, last) == (0, "done")


def test_other_failures_are_left_alone():
    raise_for_torchvision(ImportError("no module named torch"))
    with pytest.raises(ModuleNotFoundError, match="No module named 'no_such_module'"):
        late_import("no_such_module")


def test_a_missing_torchvision_is_another_failure():
    raise_for_torchvision(ImportError("please install torchvision"))


def test_every_extra_that_a_message_names_can_be_installed_in_a_clone():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    sources = [path.read_text() for folder in ("bmoe_lightning", "recipes") for path in (ROOT / folder).rglob("*.py")]
    named = {extra for text in sources for extra in re.findall(r"how_to_install\(['\"]([\w-]+)['\"]\)", text)}
    assert {"plots", "gguf", "lm-eval"} <= named <= set(extras)
    [constraints] = re.findall(r"pip install -c (\S+) -e '\.\[gguf\]'", how_to_install("gguf"))
    assert (ROOT / constraints).is_file()
