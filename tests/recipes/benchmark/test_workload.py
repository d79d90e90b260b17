"""The models that are measured, and that what is timed is what its name says."""

from __future__ import annotations

import pytest
import torch

from recipes.benchmark.curvature import measure_curvature, resolved
from recipes.benchmark.workload import PRESETS, Shape, Workload, along
from recipes.plan.architecture import load_configuration

CPU = torch.device("cpu")


@pytest.fixture
def work():
    return Workload(PRESETS["tiny"].main, CPU)


def test_building_leaves_random_state_and_default_dtype_alone():
    before = torch.get_rng_state()
    model = Workload(PRESETS["tiny"].main, CPU).model
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_default_dtype() is torch.float32
    assert not any(parameter.requires_grad for parameter in model.parameters())
    half = Shape(16, 12, layers=1, experts=4, top_k=2, examples=2, tokens=8, dtype="bfloat16", head=8)
    assert {p.dtype for p in Workload(half, CPU).model.parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() is torch.float32


def test_the_published_shape_is_the_published_one():
    config, shape = load_configuration("qwen1.5-moe-a2.7b"), PRESETS["qwen1.5-moe"].main
    published = (
        config.hidden_size, config.moe_intermediate_size, config.num_hidden_layers, config.num_experts,
        config.num_experts_per_tok, config.shared_expert_intermediate_size, config.vocab_size,
        config.hidden_size // config.num_attention_heads,
    )  # fmt: skip
    assert published == (
        shape.hidden, shape.intermediate, shape.layers, shape.experts, shape.top_k, shape.shared, shape.vocabulary,
        shape.head,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("part", "expected"), [("experts", {"gate_up_proj", "down_proj"}), ("down_proj", {"down_proj"})]
)
def test_training_reaches_the_part_it_names_and_leaves_nothing(work, part, expected):
    reached = set()
    for name, parameter in work.model.named_parameters():
        if "experts" in name:
            parameter.requires_grad_(True)
            key = name.rpartition(".")[2]
            parameter.register_post_accumulate_grad_hook(lambda _, key=key: reached.add(key))
    work.model.requires_grad_(False)
    work.train(part)
    assert reached == expected
    assert not any(p.requires_grad or p.grad is not None for p in work.model.parameters())


def test_growth_changes_one_size_at_a_time():
    base = PRESETS["default"].growth
    for axis, size, shape in along(PRESETS["default"]):
        changed = {name for name, value in vars(shape).items() if value != getattr(base, name)}
        assert len(changed) <= (3 if axis == "width d" else 1), (axis, size)
        assert shape.head <= shape.hidden


def test_curvature_variants(work):
    section = measure_curvature(work, repeats=2)
    names = [ratio.name for ratio in section.ratios]
    assert resolved(work) == "exact"
    assert sum("exact, auto (exact)" in name for name in names) == 2
    assert not any("(mc, exact)" in name for name in names)  # it is what `auto` was
    assert all(len(ratio.numerator) == len(ratio.denominator) == 2 for ratio in section.ratios)
    bars = {ratio.name: ratio.bar for ratio in section.ratios}
    assert bars["curvature (exact, auto (exact)) / training all expert matrices"] == pytest.approx(0.6 * 4)
    assert bars["curvature (mc, nystrom) / training all expert matrices"] == 1
    share = section.ratios[-1]
    assert share.bar == 0.05
    assert 0 < share.spread.median < 1
