"""The command: exit codes, where its messages go, and how little it needs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import GPT2Config

from recipes.plan.__main__ import main

ROOT = Path(__file__).parents[3]


def test_success_is_0_with_tables_and_file(tmp_path, capsys):
    file = tmp_path / "plan.json"
    assert main(["--model", "qwen1.5-moe-a2.7b", "--memory", "24,80", "--json", str(file)]) == 0
    shown = capsys.readouterr()
    assert "14.316" in shown.out
    assert "24 GiB" in shown.out
    assert "80 GiB" in shown.out
    assert shown.err == ""
    content = json.loads(file.read_text())
    assert content["model"]["parameters"] == 14_315_784_192
    assert content["settings"]["memory"] == [24, 80]


def test_settings_arrive(tmp_path):
    file = tmp_path / "plan.json"
    flags = "--examples 10 --calibration-examples 11 --tokens 12 --batch-size 2 --classes 3 --rank 4"
    flags += " --dtype float32 --experts-per-token 5"
    assert main(["--model", "qwen1.5-moe-a2.7b", "--json", str(file), *flags.split()]) == 0
    assert json.loads(file.read_text())["settings"] == {
        "model": "qwen1.5-moe-a2.7b", "examples": 10, "calibration_examples": 11, "tokens": 12, "batch_size": 2,
        "classes": 3, "rank": 4, "dtype": "float32", "memory": [80.0], "experts_per_token": 5, "write": None,
        "json": str(file),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--rank 0", "--rank must be at least 1, got 0"),
        ("--classes 1", "--classes must be at least 2, got 1"),
        ("--batch-size 0", "--batch-size must be at least 1, got 0"),
        ("--experts-per-token 0", "--experts-per-token must be at least 1, got 0"),
        ("--memory 0", "--memory must be numbers of GiB above 0, got 0"),
        ("--memory .inf,80", "--memory must be numbers of GiB above 0, got inf,80"),
        ("--memory much", "each value of --memory must be a number, got much"),
        ("--dtype float64", "--dtype must be one of bfloat16, float32, got float64"),
    ],
)
def test_impossible_values_are_2(capsys, flags, sentence):
    assert main(["--model", "qwen1.5-moe-a2.7b", *flags.split()]) == 2
    assert capsys.readouterr().err == f"error: {sentence}\n"


def test_wrong_usage_is_2(capsys):
    assert main([]) == 2
    assert capsys.readouterr().err == "error: --model must be given\n"


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("nobody/nothing", "error: the configuration 'nobody/nothing' could not be loaded"),
        ("./no/such/file.json", "error: there is no file or folder './no/such/file.json'"),
        ("dense", "error: GPT2LMHeadModel has no expert layers"),
    ],
)
def test_a_model_that_cannot_be_planned_is_1(tmp_path, capsys, model, sentence):
    if model == "dense":
        GPT2Config(n_layer=1).save_pretrained(tmp_path)
        model = str(tmp_path)
    assert main(["--model", model]) == 1
    shown = capsys.readouterr()
    assert shown.err.startswith(sentence)
    assert shown.err.count("\n") == 1
    assert shown.out == ""


def test_a_rank_beyond_the_widths_is_1(capsys):
    assert main(["--model", "qwen1.5-moe-a2.7b", "--rank", "1409"]) == 1
    assert "give at most 1408" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_1(tmp_path, capsys):
    assert main(["--model", "qwen1.5-moe-a2.7b", "--json", str(tmp_path / "no" / "plan.json")]) == 1
    assert capsys.readouterr().err.startswith("error: --json ")


def test_launch_lines_go_to_the_marked_place(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- launch lines -->\noutdated\n<!-- end of launch lines -->\nb\n")
    assert main(["--model", "qwen1.5-moe-a2.7b", "--write", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("a\n<!-- launch lines -->\n")
    assert text.endswith("<!-- end of launch lines -->\nb\n")
    assert "--train down_proj" in text
    assert "outdated" not in text
    for missing in (tmp_path / "no.md", tmp_path / "empty.md"):
        (tmp_path / "empty.md").write_text("no place\n")
        assert main(["--model", "qwen1.5-moe-a2.7b", "--write", str(missing)]) == 1
        assert capsys.readouterr().err.startswith(f"error: --write {missing}: ")


def test_a_model_of_14_billion_weights_takes_a_gibibyte_at_most():
    if not Path("/proc/self/status").is_file():
        pytest.skip("the peak of a process is read from /proc: what getrusage says includes its parent's")
    code = (
        "import pathlib, re, recipes.plan.__main__\n"
        "assert recipes.plan.__main__.main(['--model', 'qwen1.5-moe-a2.7b']) == 0\n"
        "print(re.search(r'VmHWM:\\s+(\\d+) kB', pathlib.Path('/proc/self/status').read_text())[1])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.splitlines()[-1]) * 1024 < 2**30
