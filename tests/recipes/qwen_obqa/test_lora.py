"""The main job with `--train lora`."""

from __future__ import annotations

import json

import pytest
from recipe_runs import run

from bmoe_lightning.methods import get_method, method_names
from recipes.common.cli import UsageError
from recipes.qwen_obqa.methods import build_methods
from recipes.qwen_obqa.settings import Settings


def names(**options):
    return [method.name for method in build_methods(Settings(**options).resolved())]


def test_a_dry_run_trains_adapters_and_fits_their_posterior(tmp_path, capsys):
    pytest.importorskip("peft")
    assert run(tmp_path / "run", "--train", "lora", "--methods", "map,mc_dropout,bayesian_lora") == 0
    assert "fine-tuning LoRA's matrices" in capsys.readouterr().out
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["map", "mc_dropout", "bayesian_lora"]
    assert run(tmp_path / "run", "--train", "lora", "--methods", "map,mc_dropout,bayesian_lora,temperature") == 0


def test_all_methods_are_those_that_suit_what_is_trained():
    experts, lora = names(), names(train="lora")
    assert "bayesian_lora" in lora
    assert "bayesian_lora" not in experts
    assert "laplace_lpo" in experts
    assert "laplace_lpo" not in lora
    assert "router_noise" not in lora  # the model may have no experts
    at_once = {name for name in method_names() if not get_method(name).needs.router_training}
    assert set(experts) | set(lora) == at_once


def test_a_posterior_over_adapters_is_refused_where_experts_are_trained():
    with pytest.raises(UsageError, match="bayesian_lora has its posterior over the matrices of LoRA"):
        names(methods=("bayesian_lora",))


def test_adapters_cannot_be_saved_as_a_model(tmp_path):
    with pytest.raises(UsageError, match=r"--save-model .* adapters"):
        Settings(train="lora", save_model=str(tmp_path / "model")).resolved()
