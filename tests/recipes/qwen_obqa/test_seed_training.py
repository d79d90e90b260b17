"""What the stages of one seed know from one another."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn

from recipes.qwen_obqa.seed_training import SeedTraining
from recipes.qwen_obqa.settings import Settings


@pytest.fixture
def training():
    return SeedTraining(Settings(prompt="cloze").resolved(), None, Path(), 0, "")


def detach(training, side, shared, prompt="cloze"):
    measured = {"measured_padding_side": side, "measured_shared_prompts": shared}
    training.detach(nn.Linear(1, 1), SimpleNamespace(**measured, prompt_format=SimpleNamespace(name=prompt)))
    return training.padding_side, training.shared_prompts


def test_what_a_stage_has_measured_stays_known(training):
    assert detach(training, None, None) == (None, None)
    assert detach(training, "right", False) == ("right", False)
    assert detach(training, None, None) == ("right", False)  # of a stage to which it was given


def test_prompts_of_another_format_tell_nothing_about_sharing(training):
    assert detach(training, "left", True, prompt="obqa") == ("left", None)
