"""The plan as text and JSON."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from oracles.planned import small_config

from recipes.plan.report import make_plan, plan_json, plan_text
from recipes.plan.settings import PlanSettings


@pytest.fixture
def settings(tmp_path):
    small_config(mlp_only_layers=[0]).save_pretrained(tmp_path)
    return PlanSettings(str(tmp_path), tokens=32, rank=5, memory=(1e-4, 80))


@pytest.fixture(scope="module")
def qwen():
    return make_plan(PlanSettings("qwen1.5-moe-a2.7b", memory=(24, 40, 80, 141)))


def test_text_names_what_was_found(settings):
    text = plan_text(make_plan(settings))
    assert "Qwen2MoeForCausalLM (qwen2_moe), 4 layers, width 64, vocabulary 50" in text
    assert re.search(r"\n +3 +8 +2 +48 +64 +fused\n", text)
    assert "curvature, exact (3 backward passes)" in text
    assert "curvature, mc (1 backward pass)" in text
    table = [line for line in text.splitlines() if "recipes.qwen_obqa" not in line]
    assert max(map(len, table)) < 150


def test_unlike_expert_layers_have_a_line_each(settings, monkeypatch):
    plan = make_plan(settings)
    odd = replace(plan.model.experts[0], top_k=1)
    blocks = (plan.model.blocks[0], replace(plan.model.blocks[1], experts=(odd,)), *plan.model.blocks[2:])
    text = plan_text(replace(plan, model=replace(plan.model, blocks=blocks)))
    assert re.search(r"\n +1 +8 +1 +48 +64 +fused\n +2 +8 +2 +48 +64 +fused\n", text)


def test_json_holds_the_same_figures(settings):
    plan = make_plan(settings)
    content = json.loads(plan_json(plan))
    assert content["settings"]["rank"] == 5
    assert content["bytes"] == plan.sizes
    assert content["operations"] == plan.operations
    assert [layer["name"] for layer in content["model"]["expert_layers"]] == [
        f"model.layers.{i}.mlp.experts" for i in (1, 2, 3)
    ]
    assert content["model"]["expert_layers"][0]["experts_per_token"] == 2
    assert len(content["training"]) == 8
    assert [entry["peak"] for entry in content["launch"]] == [launch.training.peak for launch in plan.launches]
    for training, entry in zip(plan.trainings, content["training"], strict=True):
        assert entry["peak"] == training.peak
        assert entry["fits"] == {"0.0001": False, "80": True}
        assert entry["checkpoint"] == entry["snapshot"] + entry["optimizer"]
        assert entry["optimizer_traffic"] == training.traffic


def test_yes_and_no(settings):
    rows = [line.split() for line in plan_text(make_plan(settings)).splitlines() if line.endswith(" yes")]
    assert [row[-2:] for row in rows] == [["no", "yes"]] * 12


def test_qwen_as_the_paper_runs_it(qwen):
    # 0.2 GB of factors at rank 10; rounded at random, the second layers fit into 80 GiB and all experts do not.
    assert qwen.sizes["factors"] == pytest.approx(0.2e9, rel=0.02)
    fits = {
        (t.trained, t.updates, t.checkpointing): [size for size in (24, 40, 80, 141) if t.fits(size)]
        for t in qwen.trainings
    }
    assert fits["down_proj", "stochastic_rounding", False] == [80, 141]
    assert fits["down_proj", "master_weights", False] == [141]
    assert fits["experts", "stochastic_rounding", False] == [141]
    assert fits["experts", "master_weights", False] == []
    one = qwen.operations["forward"]
    assert qwen.operations["curvature_mc"] < qwen.operations["training_down_proj"] < qwen.operations["training_experts"]
    assert 2 < qwen.operations["training_down_proj"] / one < 2.2
    # About two operations a parameter and token; the embedding multiplies nothing and the head runs once a question.
    assert one / (2 * (qwen.model.active - 2 * 151936 * 2048) * 8 * 256) == pytest.approx(1, abs=0.05)


def test_each_way_to_train_bfloat16_has_its_memory(settings):
    plan = make_plan(settings)
    copied, rounded = (
        next(t for t in plan.trainings if t.updates == way and t.trained == "experts" and not t.checkpointing)
        for way in ("master_weights", "stochastic_rounding")
    )
    weights = copied.gradients // 2
    assert copied.optimizer - rounded.optimizer == 8 * weights
    assert (copied.weights, copied.gradients) == (rounded.weights, rounded.gradients)
    text = plan_text(plan)
    assert "bfloat16 + float32 copy" in text
    assert "bfloat16, stochastic rounding" in text
    assert "stochastic rounding needs torchao" in text
    assert "torchao" not in plan_text(make_plan(replace(settings, dtype="float32")))


def test_float32_needs_no_second_half(settings):
    plan = make_plan(replace(settings, dtype="float32"))
    assert {t.trained_dtype for t in plan.trainings} == {"float32"}
    assert len(plan.trainings) == 4
    assert plan.model.weight_bytes == 4 * plan.model.parameters


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"rank": 49}, r"--rank 49 is more than the experts 'model\.layers\.1.*at most 48"),
        ({"tokens": 65}, "--tokens 65 is more than the 64 positions"),
        ({"experts_per_token": 9}, "--experts-per-token 9 is more than the 8 experts"),
    ],
)
def test_more_than_the_model_has(settings, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_plan(replace(settings, **options))
