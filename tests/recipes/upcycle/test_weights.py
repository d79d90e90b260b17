"""An upcycled model computes what the dense one does, and what makes its experts different does so as described."""

from __future__ import annotations

import pytest
import torch
import upcycle_cases as cases
from torch.nn.functional import silu

from bmoe_lightning.experts import find_expert_layers
from recipes.upcycle.architecture import empty_model, moe_config
from recipes.upcycle.weights import Mlp, partly_reinitialised, router_weight, segments_of, with_noise

# Routing weights are computed in float32 whatever the dtype, so they sum to 1 up to 1.2e-7 in float64 too.
CLOSE = {torch.float32: 1e-5, torch.float64: 2e-6}

MODELS = {
    "llama": ("llama", {}),
    "tied embeddings": ("llama", {"tie_word_embeddings": True}),
    "attention biases": ("llama", {"attention_bias": True}),
    "wide heads": ("llama", {"head_dim": 8}),
    "multi-head attention": ("llama", {"num_key_value_heads": 4}),
    "another activation": ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "large theta": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}),
    "scaled positions of llama 3": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
            }
        },
    ),
    "yarn": (
        "qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16,
            }
        },
    ),
    "qwen2": ("qwen2", {}),
    "mistral": ("mistral", {}),
}  # fmt: skip


def apply(mlp, x):
    return (silu(x @ mlp.gate.T) * (x @ mlp.up.T)) @ mlp.down.T


def random_mlp(width=8, hidden=6):
    generator = torch.Generator().manual_seed(0)
    return Mlp(*(torch.randn(*shape, generator=generator) for shape in ((width, hidden),) * 2 + ((hidden, width),)))


def without_output_bias(model):
    """Llama's attention biases include one of the output, which Qwen2-MoE lacks."""
    for layer in model.model.layers:
        if layer.self_attn.o_proj.bias is not None:
            torch.nn.init.zeros_(layer.self_attn.o_proj.bias)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_the_function_is_the_dense_one(name, tmp_path):
    family, changes = MODELS[name]
    dense = without_output_bias(cases.dense_model(family, **changes))
    expected = cases.logits(dense)
    found = cases.logits(cases.upcycled(tmp_path / "moe", dense))
    torch.testing.assert_close(found, expected, rtol=0, atol=CLOSE[torch.float32] * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"layers": "all", "top_k": 1}),
        ("qwen2", {"layers": "1", "top_k": 3}),
        ("llama", {"layers": "all", "segments": 2}),
        ("qwen2", {"layers": "2", "segments": 8, "top_k": 3}),
        ("llama", {"layers": "all", "router_std": 10.0}),
    ],
)
def test_the_function_is_the_dense_one_in_float64(family, changes, tmp_path):
    dense = cases.dense_model(family, torch.float64)
    expected = cases.logits(dense)
    moe = cases.upcycled(tmp_path / "moe", dense, **changes)
    assert {parameter.dtype for parameter in moe.parameters()} == {torch.float64}
    bound = CLOSE[torch.float64] * float(expected.abs().max())
    torch.testing.assert_close(cases.logits(moe), expected, rtol=0, atol=bound)


@pytest.mark.parametrize("change", [{"norm_topk_prob": False}, {"rms_norm_eps": 1e-2}])
def test_the_bound_is_narrow_enough_to_see_a_wrong_configuration(change, tmp_path):
    dense = cases.dense_model()
    expected = cases.logits(dense)
    moe = cases.upcycled(tmp_path / "moe", dense)
    for name, value in change.items():
        setattr(moe.config, name, value)
    wrong = type(moe)(moe.config).eval()
    wrong.load_state_dict(moe.state_dict())
    assert float((cases.logits(wrong) - expected).abs().max()) > 100 * CLOSE[torch.float32] * float(
        expected.abs().max()
    )


def test_generating_with_a_cache_gives_the_dense_models_tokens(tmp_path):
    dense = cases.dense_model("qwen2")
    moe = cases.upcycled(tmp_path / "moe", dense)
    ids = torch.arange(4, 12)[None]
    first, second = (model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0) for model in (dense, moe))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("layers", "expected"), [("all", [0, 1, 2]), ("upper-half", [1, 2]), ("1", [2]), ("3", [0, 1, 2])]
)
def test_the_upper_layers_are_upcycled(layers, expected):
    found = find_expert_layers(empty_model(moe_config(cases.dense_model().config, cases.settings(layers=layers))))
    assert [layer.name for layer in found] == [f"model.layers.{i}.mlp.experts" for i in expected]
    assert {(layer.num_experts, layer.d_in, layer.d_out) for layer in found} == {(4, 24, 16)}


def test_segments_are_experts_of_their_own():
    moe = empty_model(moe_config(cases.dense_model().config, cases.settings(segments=4)))
    assert (moe.config.num_experts, moe.config.num_experts_per_tok, moe.config.moe_intermediate_size) == (16, 8, 6)
    [first, *_] = find_expert_layers(moe)
    assert (first.num_experts, first.d_in) == (16, 6)


def test_the_mean_of_the_segments_is_the_mlp():
    mlp, x = random_mlp(), torch.randn(5, 6)
    parts = segments_of(mlp, 4)
    assert {len(part.gate) for part in parts} == {2}
    torch.testing.assert_close(torch.stack([apply(part, x) for part in parts]).mean(0), apply(mlp, x))


def test_routers_are_seeded_and_normal(tmp_path):
    dense = cases.dense_model()
    config = moe_config(dense.config, cases.settings(experts=64, segments=2))
    first = router_weight(config, 2, 0.5, torch.Generator().manual_seed(3))
    assert first.shape == (128, 16)
    assert torch.equal(first[0::2], first[1::2])
    assert 0.45 < float(first.std()) < 0.55
    again, other = (router_weight(config, 2, 0.5, torch.Generator().manual_seed(seed)) for seed in (3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    routers = [
        layer.mlp.gate.weight
        for layer in cases.upcycled(tmp_path / "moe", dense, layers="all", router_std=0.1).model.layers
    ]
    assert not torch.equal(routers[0], routers[1])


def test_noise_is_relative_to_each_matrix():
    mlp = random_mlp(400, 300)
    scaled = Mlp(mlp.gate, 10 * mlp.up, mlp.down)
    changed = with_noise(scaled, 0.1, torch.Generator().manual_seed(0))
    for before, after in zip(scaled, changed, strict=True):
        assert float((after - before).std() / before.std()) == pytest.approx(0.1, rel=0.02)


def test_the_same_hidden_units_of_all_matrices_are_drawn_anew():
    mlp = random_mlp(600, 50)
    shifted = Mlp(mlp.gate + 1, 3 * mlp.up, mlp.down)
    changed = partly_reinitialised(shifted, 0.25, torch.Generator().manual_seed(0))
    units = [
        (changed.gate != shifted.gate).any(1),
        (changed.up != shifted.up).any(1),
        (changed.down != shifted.down).any(0),
    ]
    assert int(units[0].sum()) == 150
    assert all(torch.equal(units[0], other) for other in units[1:])
    assert float(changed.gate[units[0]].mean()) == pytest.approx(1, abs=0.05)
    assert float(changed.up[units[0]].std()) == pytest.approx(3, rel=0.05)
    assert all(torch.equal(a, b) for a, b in zip(partly_reinitialised(mlp, 0.0, torch.Generator()), mlp, strict=True))


@pytest.mark.parametrize("changes", [{"noise": 0.1}, {"reinitialise": 0.5}])
def test_different_experts_are_different_and_seeded(changes, tmp_path):
    dense = cases.dense_model()
    weights = [
        model.model.layers[2].mlp.experts.down_proj
        for model in (
            cases.upcycled(tmp_path / "first", dense, **changes),
            cases.upcycled(tmp_path / "again", dense, **changes),
            cases.upcycled(tmp_path / "other", dense, seed=1, **changes),
        )
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert len({tuple(expert.flatten().tolist()) for expert in weights[0].detach()}) == 4
