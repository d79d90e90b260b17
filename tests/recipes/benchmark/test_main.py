"""The command: exit codes, what it prints, what it writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from recipes.benchmark import __main__ as benchmark
from recipes.benchmark import prediction
from recipes.benchmark.__main__ import main
from recipes.benchmark.workload import PRESETS

ROOT = Path(__file__).parents[3]


@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:LPO ends where it stops searching")
def test_every_section_is_printed_and_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prediction, "VALIDATION_EXAMPLES", 20)
    file = tmp_path / "benchmark.json"
    threads = torch.get_num_threads()
    assert main(["--model-shape", "tiny", "--repeats", "2", "--threads", "1", "--json", str(file)]) == 0
    assert torch.get_num_threads() == threads
    shown = capsys.readouterr()
    for text in (
        "curvature (empirical, auto (exact)) / training down_proj only",
        "prediction / floor, K = 3",
        "LPO's pass / one predictive pass",
        "tokens of an example",
        "torch.func.jacrev",
        f"torch {torch.__version__}",
        "hidden 16, expert width 12",
    ):
        assert text in shown.out
    assert "growth: experts = 8" in shown.err
    content = json.loads(file.read_text())
    sections = {section["name"]: section for section in content["sections"]}
    assert tuple(sections) == benchmark.SECTIONS
    for section in sections.values():
        for ratio in section["ratios"]:
            assert len(ratio["numerator"]) == len(ratio["denominator"]) == 2
            assert ratio["ratio"]["low"] <= ratio["ratio"]["median"] <= ratio["ratio"]["high"]
        for growth in section["growth"]:
            assert len(growth["sizes"]) == len(growth["values"]) == len(growth["raw"])
            assert isinstance(growth["exponent"], float)
    jacobian, *others = sections["peers"]["peers"]
    assert jacobian["difference"] < 1e-4
    assert [peer["name"] for peer in others] == ["curvlinops", "laplace-torch"]
    assert all(peer["error"] or peer["peer_seconds"] for peer in others)


def test_only_some_sections(capsys):
    assert main(["--model-shape", "tiny", "--repeats", "1", "--only", "prediction"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n## ") == 1
    assert "## Linearised prediction" in out


def test_the_command_knows_every_shape():
    assert set(benchmark.SHAPES) == set(PRESETS)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--repeats 0", "--repeats must be at least 1, got 0"),
        ("--threads 0", "--threads must be at least 1, got 0"),
        ("--only lpo,speed", "--only knows curvature, prediction, lpo, growth, peers, got speed"),
    ],
)
def test_impossible_values_are_2(capsys, flags, sentence):
    assert main(flags.split()) == 2
    assert capsys.readouterr().err == f"error: {sentence}\n"


@pytest.mark.parametrize("flags", ["--device tpu", "--model-shape large", "--what 1"])
def test_wrong_usage_is_2(capsys, flags):
    with pytest.raises(SystemExit) as stopped:
        main(flags.split())
    assert stopped.value.code == 2
    assert "usage: python -m recipes.benchmark" in capsys.readouterr().err


def test_a_device_that_is_not_there_is_1(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--device", "cuda"]) == 1
    shown = capsys.readouterr()
    assert shown.err.startswith("error: --device cuda: torch finds no CUDA device")
    assert shown.out == ""


def test_a_file_that_cannot_be_written_is_1(tmp_path, capsys):
    flags = ["--model-shape", "tiny", "--repeats", "1", "--only", "prediction"]
    assert main([*flags, "--json", str(tmp_path / "no" / "benchmark.json")]) == 1
    assert "error: --json " in capsys.readouterr().err


def test_help_needs_no_torch():
    code = (
        "import sys, recipes.benchmark.__main__\n"
        "try: recipes.benchmark.__main__.main(['--help'])\n"
        "except SystemExit as stopped: sys.exit(7 if 'torch' in sys.modules else stopped.code)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert "--model-shape" in result.stdout
