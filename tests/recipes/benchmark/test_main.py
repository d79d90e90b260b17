"""The command: exit codes, what it prints, what it writes."""

from __future__ import annotations

import json
from typing import get_args

import pytest
import torch

from recipes.benchmark import prediction
from recipes.benchmark.__main__ import main
from recipes.benchmark.settings import SECTIONS, ShapeName
from recipes.benchmark.workload import PRESETS


@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:LPO ended at the limit")
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
        "average of predictions / 8 forwards, mean field",
        "average of scores / forward, a temperature for each token",
        "training step: contiguous / slice, bfloat16",
        "tokens of an example",
        "torch.func.jacrev",
        f"torch {torch.__version__}",
        "hidden 16, expert width 12",
    ):
        assert text in shown.out
    assert "growth: experts = 8" in shown.err
    content = json.loads(file.read_text())
    sections = {section["name"]: section for section in content["sections"]}
    assert tuple(sections) == SECTIONS
    for section in sections.values():
        for ratio in section["ratios"]:
            assert len(ratio["numerator"]) == len(ratio["denominator"]) == 2
            assert ratio["ratio"]["low"] <= ratio["ratio"]["median"] <= ratio["ratio"]["high"]
        for growth in section["growth"]:
            assert len(growth["sizes"]) == len(growth["values"]) == len(growth["raw"])
            assert isinstance(growth["exponent"], float)
    jacobian, *others = sections["peers"]["peers"]
    assert jacobian["difference"] < 1e-4
    assert [peer["name"] for peer in others] == ["laplace-torch", "curvlinops", "curvlinops"]
    assert all(peer["error"] or peer["peer_seconds"] for peer in others)


def test_only_some_sections(capsys):
    assert main(["--model-shape", "tiny", "--repeats", "1", "--only", "prediction"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n## ") == 1
    assert "## Linearised prediction" in out


def test_the_command_knows_every_shape():
    assert set(get_args(ShapeName)) == set(PRESETS)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--repeats 0", "--repeats must be at least 1, got 0"),
        ("--threads 0", "--threads must be at least 1, got 0"),
        (
            "--only lpo,speed",
            "each value of --only must be one of curvature, prediction, lpo, routers, head, growth, peers, serving, "
            "got speed",
        ),
        ("--device tpu", "--device must be one of cpu, cuda, got tpu"),
        ("--model-shape large", "--model-shape must be one of default, qwen1.5-moe, tiny, got large"),
    ],
)
def test_impossible_values_are_2(capsys, flags, sentence):
    assert main(flags.split()) == 2
    assert capsys.readouterr().err == f"error: {sentence}\n"


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
