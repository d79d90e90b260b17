"""What the stages of one seed know from one another."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn

from recipes.qwen_obqa.seed_run import SeedRun
from recipes.qwen_obqa.settings import Settings


@pytest.fixture
def run():
    return SeedRun(Settings(prompt="cloze").resolved(), None, (), Path(), 0, "")


def detach(run, side, shared, prompt="cloze"):
    measured = {"measured_padding_side": side, "measured_shared_prompts": shared}
    run._detach(nn.Linear(1, 1), SimpleNamespace(**measured, prompt_format=SimpleNamespace(name=prompt)))
    return run._padding_side, run._shared_prompts


def test_what_a_stage_has_measured_stays_known(run):
    assert detach(run, None, None) == (None, None)
    assert detach(run, "right", False) == ("right", False)
    assert detach(run, None, None) == ("right", False)  # of a stage to which it was given


def test_prompts_of_another_format_tell_nothing_about_sharing(run):
    assert detach(run, "left", True, prompt="obqa") == ("left", None)
