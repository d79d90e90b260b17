"""Launch lines: what each device holds, and that the commands are ones the recipe takes."""

from __future__ import annotations

import shlex

import pytest
import torch
from oracles.planned import WORK, built

from recipes.common.cli import parse
from recipes.common.readme import README, ROOT, between
from recipes.plan.architecture import describe
from recipes.plan.launch import launches, sharded, with_buckets
from recipes.plan.memory import training_memory
from recipes.plan.report import PLACE, launch_section, make_plan
from recipes.plan.settings import PlanSettings
from recipes.qwen_obqa.settings import Settings


@pytest.fixture(params=[{}, {"mlp_only_layers": [0]}], ids=["moe", "dense first"])
def model(request):
    return built(torch.bfloat16, **request.param)


@pytest.fixture(params=[("down_proj", torch.bfloat16), ("experts", torch.bfloat16), ("down_proj", torch.float32)])
def training(request, model):
    part, dtype = request.param
    return training_memory(describe(model), WORK, part, dtype, checkpointing=False)


@pytest.mark.parametrize("processes", [1, 2, 7])
def test_shares_and_what_is_put_together(model, training, processes):
    planned = describe(model)
    found = sharded(planned, training, processes)
    for name in ("weights", "gradients", "optimizer", "step"):
        assert getattr(found, name) == -(-getattr(training, name) // processes)
    # Against the parameters themselves, in the dtype of what is trained and what is not.
    own = 4 if training.trained_dtype == "float32" else 2
    sizes, gradients = [], []
    for block in model.model.layers:
        trained = {id(p) for n, p in block.named_parameters() if "experts." in n and
                   (training.trained == "experts" or "experts.down_proj" in n)}  # fmt: skip
        sizes.append(sum(p.numel() * (own if id(p) in trained else 2) for p in block.parameters() if p.dim() > 1))
        gradients.append(sum(p.numel() * own for p in block.parameters() if id(p) in trained))
    around = training.weights - sum(sizes)
    assert found.curvature - training.curvature == around + 3 * max(sizes)
    assert found.activations - training.activations == around + 3 * max(sizes) + 2 * max(gradients)


def test_buckets(training):
    assert with_buckets(training).peak == training.peak + training.gradients


def test_every_command_is_one_that_the_recipe_takes():
    plan = make_plan(PlanSettings("qwen1.5-moe-a2.7b"))
    for launch in plan.launches:
        words = shlex.split(launch.command)
        settings = parse(Settings, words[words.index("recipes.qwen_obqa") + 1 :], program="x", description="x")
        assert settings.model == "Qwen/Qwen1.5-MoE-A2.7B"
        assert (settings.strategy == "sharded") is launch.sharded
        assert settings.train == launch.training.trained
        assert settings.half_precision_updates == launch.training.updates
        assert launch.training.fits(80)


@pytest.mark.parametrize(
    ("sizes", "alone", "replicas"),
    [
        ((80.0,), ("down_proj", "stochastic_rounding"), ("down_proj", "stochastic_rounding")),
        ((24.0, 80.0, 141.0), ("down_proj", "stochastic_rounding"), ("down_proj", "stochastic_rounding")),
        ((141.0,), ("experts", "stochastic_rounding"), ("experts", "stochastic_rounding")),
        ((300.0, 400.0), ("experts", "master_weights"), ("experts", "master_weights")),
        ((210.0,), ("experts", "master_weights"), ("experts", "stochastic_rounding")),  # 196 GiB, 219 with the buckets
        ((24.0,), ("down_proj", "stochastic_rounding"), ("down_proj", "stochastic_rounding")),  # nothing fits
    ],
)
def test_all_experts_are_advised_where_they_fit(sizes, alone, replicas):
    one, ddp, *sharded_lines = make_plan(PlanSettings("qwen1.5-moe-a2.7b", memory=sizes)).launches
    for launch, (part, way) in ((one, alone), (ddp, replicas)):
        assert (launch.training.trained, launch.training.updates) == (part, way)
        words = shlex.split(launch.command)
        settings = parse(Settings, words[words.index("recipes.qwen_obqa") + 1 :], program="x", description="x")
        assert (settings.train, settings.half_precision_updates) == (part, way)
    assert all(launch.training.trained == "experts" for launch in sharded_lines)


def test_the_pages_have_what_the_plan_says():
    section = launch_section(make_plan(PlanSettings("qwen1.5-moe-a2.7b", memory=(24.0, 40.0, 80.0, 141.0))))
    pages = [page.read_text(encoding="utf-8") for page in (README, *(ROOT / "docs").glob("**/*.md"))]
    marked = [text for text in pages if f"<!-- {PLACE} -->" in text]
    assert marked
    assert all(between(text, PLACE, section) == text for text in marked)


def test_a_configuration_file_stands_for_its_folder(model, training):
    commands = [launch.command for launch in launches(describe(model), "models/own/config.json", [training], (80.0,))]
    assert all("--model models/own" in command for command in commands)
