"""What is read off a model, against models that are really built and published sizes."""

from __future__ import annotations

import json

import pytest
import torch
from oracles.planned import built, small_config
from torch import nn
from transformers import GPT2Config, MixtralConfig, Qwen2MoeConfig, Qwen3VLMoeConfig

from bmoe_lightning.models.loading import ModelUnavailableError
from recipes.plan.architecture import build, describe, known_names, load_configuration


def planned(config, dtype=torch.bfloat16, **options):
    return describe(build(config, dtype), **options)


class TestPublishedModels:
    def test_qwen(self):
        model = planned(load_configuration("qwen1.5-moe-a2.7b"))
        # The numbers of the published checkpoint.
        assert model.parameters == 14_315_784_192
        assert model.weight_bytes == 2 * model.parameters
        assert round(model.active / 1e9, 1) == 2.7
        assert model.routed == 24 * 60 * 3 * 2048 * 1408
        assert model.second == model.routed // 3
        assert [(e.layer.num_experts, e.top_k, e.layer.d_in, e.layer.d_out) for e in model.experts] == [
            (60, 4, 1408, 2048)
        ] * 24
        assert model.first == 0
        assert model.one_position

    def test_deepseek(self):
        model = planned(load_configuration("deepseek-moe-16b"))
        assert model.parameters == 16_375_728_128
        assert round(model.active / 1e9, 1) == 2.8
        assert len(model.blocks) == 28
        assert len(model.experts) == 27
        assert model.first == 1  # the first layer is dense
        assert {(e.layer.num_experts, e.top_k) for e in model.experts} == {(64, 6)}

    def test_names(self):
        assert known_names() == ["deepseek-moe-16b", "qwen1.5-moe-a2.7b"]


def test_counts_are_those_of_a_model_with_weights():
    real = built()
    model = planned(small_config(), torch.float32)
    assert model == describe(real)
    experts = [m for name, m in real.named_modules() if name.endswith("mlp.experts")]
    assert model.parameters == sum(p.numel() for p in real.parameters())
    assert model.routed == sum(p.numel() for m in experts for p in m.parameters())
    assert model.second == sum(m.down_proj.numel() for m in experts)
    idle = sum(p[0].numel() for m in experts for p in m.parameters()) * (8 - 2)
    assert model.active == model.parameters - idle
    linears = sum(m.weight.numel() for m in real.model.modules() if isinstance(m, nn.Linear))
    routers = sum(p.numel() for name, p in real.named_parameters() if name.endswith("mlp.gate.weight"))
    assert sum(block.weights for block in model.blocks) == linears + routers


def test_dense_layers_and_experts_without_a_gate():
    model = planned(small_config(mlp_only_layers=[0, 2]))
    assert [len(block.experts) for block in model.blocks] == [0, 1, 0, 1]
    assert model.first == 1
    assert all(e.gated and e.first_width == 96 for e in model.experts)


def test_a_model_that_also_sees_is_its_text_model():
    text = {**small_config().to_dict(), "num_experts": 8, "head_dim": 16}
    text.pop("model_type")
    config = Qwen3VLMoeConfig(
        text_config=text, vision_config={"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2}
    )
    model = planned(config)
    assert len(model.blocks) == len(model.experts) == 4
    assert {e.top_k for e in model.experts} == {2}


@pytest.mark.parametrize("as_folder", [True, False])
def test_a_file_or_its_folder(tmp_path, as_folder):
    small_config().save_pretrained(tmp_path)
    found = load_configuration(str(tmp_path if as_folder else tmp_path / "config.json"))
    assert isinstance(found, Qwen2MoeConfig)
    assert found.moe_intermediate_size == 48


def test_experts_a_token_from_the_router_else_the_configuration_else_the_person():
    assert planned(MixtralConfig(num_hidden_layers=1, num_experts_per_tok=3)).experts[0].top_k == 3
    model = build(small_config(), torch.bfloat16)
    assert describe(model, experts_per_token=5).experts[0].top_k == 5
    for module in model.modules():
        if hasattr(module, "top_k"):
            module.top_k = None
    assert describe(model).experts[0].top_k == 2
    model.config.num_experts_per_tok = 99  # of 8
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts.*--experts-per-token"):
        describe(model)


class TestRefusals:
    def test_a_hub_id_without_the_hub(self):
        with pytest.raises(ModelUnavailableError, match=r"'nobody/nothing' could not be loaded.*qwen1\.5-moe-a2\.7b"):
            load_configuration("nobody/nothing")

    def test_neither_file_nor_hub_id(self):
        with pytest.raises(ModelUnavailableError, match=r"no file or folder '\./no/such/thing'"):
            load_configuration("./no/such/thing")

    @pytest.mark.parametrize(
        ("content", "sentence"),
        [
            ("{", "not a valid JSON"),
            ('{"hidden_size": 3}', "model_type"),
            ('{"model_type": "nobody_knows"}', "nobody_knows"),
            (
                json.dumps({"model_type": "nobody_knows", "auto_map": {"AutoConfig": "own_code.Config"}}),
                "remote code, which is never run",
            ),
            ('{"model_type": "qwen2_moe", "num_experts": "many"}', "num_experts.*expected int"),
        ],
    )
    def test_files_that_are_no_configuration(self, tmp_path, content, sentence):
        path = tmp_path / "config.json"
        path.write_text(content)
        (tmp_path / "own_code.py").write_text("raise SystemExit('ran')")
        with pytest.raises(ModelUnavailableError, match=sentence):
            load_configuration(str(path))

    def test_a_folder_without_configuration(self, tmp_path):
        with pytest.raises(ModelUnavailableError, match="could not be loaded"):
            load_configuration(str(tmp_path))

    def test_a_dense_model(self):
        with pytest.raises(ValueError, match="GPT2LMHeadModel has no expert layers"):
            planned(GPT2Config(n_layer=1))

    def test_no_causal_language_model(self):
        from transformers import SwitchTransformersConfig

        with pytest.raises(ModelUnavailableError, match=r"no causal language model.*'switch_transformers'"):
            build(SwitchTransformersConfig(), torch.bfloat16)
