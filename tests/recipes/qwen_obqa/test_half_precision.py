"""How a run trains weights in half precision."""

from __future__ import annotations

import importlib.util
from dataclasses import fields

import pytest

from bmoe_lightning import base_finetuner as finetuner
from bmoe_lightning.optim import MasterWeightAdamW, adamw
from recipes.common.cli import UsageError
from recipes.common.errors import RecipeError
from recipes.qwen_obqa.__main__ import main
from recipes.qwen_obqa.methods import build_methods
from recipes.qwen_obqa.run_folder import check_start
from recipes.qwen_obqa.settings import Settings

PAPER = {"model": "Qwen/Qwen1.5-MoE-A2.7B"}


def test_the_main_job_trains_bfloat16_with_a_float32_copy():
    settings = Settings(**PAPER).resolved()
    assert (settings.precision, settings.half_precision_updates) == ("bf16-true", "master_weights")
    assert "half_precision_updates" in {entry.name for entry in fields(settings)}


def test_float16_is_not_rounded_stochastically():
    chosen = {**PAPER, "half_precision_updates": "stochastic_rounding"}
    with pytest.raises(UsageError, match="is for bfloat16, and --precision is 16-true; give bf16-true"):
        Settings(**chosen, precision="16-true").resolved()
    assert Settings(**chosen).resolved().precision == "bf16-true"


def test_a_missing_torchao_is_told_before_anything_is_loaded(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(adamw, "find_spec", lambda name: None if name == "torchao" else find(name))
    chosen = Settings(
        output_dir=str(tmp_path), accelerator="cpu", half_precision_updates="stochastic_rounding", **PAPER
    )
    with pytest.raises(RecipeError, match="install the extra torchao"):
        check_start(chosen.resolved(), build_methods(chosen.resolved()), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "copied"), [((), True), (("--half-precision-updates", "nearest"), False)])
def test_the_option_reaches_the_optimizer(tmp_path, monkeypatch, capsys, flags, copied):
    made, make = [], finetuner.make_adamw
    monkeypatch.setattr(finetuner, "make_adamw", lambda *a, **k: made.append(make(*a, **k)) or made[-1])
    arguments = ["--dry-run", "--quiet", "--accelerator", "cpu", "--precision", "bf16-true", "--methods", "map"]
    rate = ["--learning-rate", "5e-6"]
    assert main([*arguments, *rate, "--output-dir", str(tmp_path / "run"), *flags]) == 0
    assert [isinstance(optimizer, MasterWeightAdamW) for optimizer in made] == [copied]
    assert ("of the trained bfloat16 weights" in capsys.readouterr().err) is not copied
