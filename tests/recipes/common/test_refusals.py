"""Which exceptions of a recipe are messages for the user, printed as one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from bmoe_lightning.curvature.gradient_share import share_of_squares
from bmoe_lightning.data.prompts import get_prompt_format
from bmoe_lightning.experts import find_expert_layers
from recipes.common.cli import UsageError, exit_status
from recipes.common.refusals import refusal
from recipes.paper import run as paper_run
from recipes.paper import worker
from recipes.paper.settings import PaperSettings
from recipes.qwen_obqa import __main__ as qwen_obqa
from recipes.qwen_obqa import experiment


def caught(action):
    with pytest.raises(Exception) as found:  # noqa: PT011  (any exception)
        action()
    return found.value


REFUSED = {
    "a value": (lambda: get_prompt_format("nothing"), "unknown prompt 'nothing'; choose from "),
    "a model without experts": (lambda: find_expert_layers(nn.Linear(2, 2)), "Linear has no expert layers. Supported"),
    "a file": (lambda: Path("nowhere").read_text(), "[Errno 2] No such file or directory: 'nowhere'"),
    "memory": (lambda: torch.empty(1 << 60, dtype=torch.uint8), "there is not enough memory ("),
}


def raised_in_c():
    share_of_squares(torch.ones(3, 5))  # too many values to unpack


def raised_elsewhere():
    raise ValueError("of a test")


DEFECTS = {
    "in C code that this package calls": raised_in_c,
    "in another module": raised_elsewhere,
    "another class": lambda: {}["missing"],
    "Python's own": lambda: int("x"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_was_refused_is_one_line(case, capsys):
    action, begin = REFUSED[case]
    message = refusal(caught(action))
    assert message.startswith(begin)
    assert "\n" not in message
    assert exit_status(action) == 1
    assert capsys.readouterr().err == f"error: {message}\n"


@pytest.mark.parametrize("case", DEFECTS)
def test_a_defect_keeps_its_traceback(case):
    error = caught(DEFECTS[case])
    assert refusal(error) == ""
    with pytest.raises(type(error)):
        exit_status(DEFECTS[case])


def test_wrong_usage_has_a_status_of_its_own(capsys):
    def action():
        raise UsageError("--seeds must be at least 1, got 0")

    assert exit_status(action) == 2
    assert capsys.readouterr().err == "error: --seeds must be at least 1, got 0\n"


def refusing(*_):
    find_expert_layers(nn.Linear(2, 2))


def test_the_main_job_refuses_a_model_without_experts_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(experiment, "run", refusing)
    assert qwen_obqa.main(["--model", "some/model"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: Linear has no expert layers.")


def test_the_log_of_a_run_of_a_study_ends_in_one_line(monkeypatch, capsys):
    """The last line of its log is what the main process says of it."""
    monkeypatch.setattr(paper_run, "complete_one", refusing)
    settings = PaperSettings(table=(5,))
    (*_, description) = worker.worker_arguments(settings, run="recall-experts")
    assert json.loads(description)["run"] == "recall-experts"
    assert worker.main(description) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: Linear has no expert layers.")
