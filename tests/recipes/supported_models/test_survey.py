from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from bmoe_lightning.models import DeepseekForCausalLM
from recipes.supported_models import catalogue
from recipes.supported_models.catalogue import families, families_of_transformers, is_own, own_families, uses_interface
from recipes.supported_models.overrides import OVERRIDES
from recipes.supported_models.tiny import CannotBuildError, TinyFamily, build, wrapper_name

# One of every kind: plain, transposed with biases, a norm after each expert, no gate, Mamba, linear attention, a hash
# for a router, a skipped expert, image experts, weights shared by two modules, token classes, encoder and decoder, this
# library's own.
QUICK = (
    "mixtral",
    "gpt_oss",
    "muse_spark",
    "nemotron_h",
    "qwen3_next",
    "deepseek_v4",
    "zaya",
    "ernie4_5_vl_moe",
    "diffusion_gemma",
    "openai_privacy_filter",
    "switch_transformers",
    "bmoe_lightning.deepseek_moe",
)
# What has no tiny model; a family that is new in transformers belongs into a test before it belongs here.
REFUSED = {"vitpose_backbone": "no router"}
# Text models that have a multimodal wrapper around them.
WRAPPED = (
    "aria",
    "dots3_note",
    "gemma4",
    "inkling",
    "inkling2",
    "llama4",
    "minimax_m3_vl",
    "qwen3_5_moe",
    "qwen4_exp",
)
# The second weights of the families whose experts do not hold a `down_proj`.
SECOND_WEIGHTS = {
    "dbrx": r"experts\.mlp\.w2$",
    "doge": r"mlp\.up_embed\.weight$",
    "jetmoe": r"output_linear\.weight$",
    "nllb_moe": r"experts\.expert_\d+\.fc2\.weight$",
    "switch_transformers": r"experts\.expert_\d+\.wo\.weight$",
}


def down_proj_weights(tiny: TinyFamily) -> dict[str, list[nn.Parameter]]:
    """The second weights of each expert layer, by the name of the module that holds its experts."""
    pattern = SECOND_WEIGHTS.get(tiny.family, r"experts\.down_proj$")
    found: dict[str, list[nn.Parameter]] = {}
    for name, parameter in tiny.model.named_parameters():
        if re.search(pattern, name):
            found.setdefault(re.sub(r"\.expert_\d+\..*", "", name), []).append(parameter)
    return found


def check_family(family: str) -> None:
    tiny = build(family)
    layers = down_proj_weights(tiny)
    assert layers
    assert not tiny.model.training
    assert sum(parameter.numel() for parameter in tiny.model.parameters()) < 200_000
    reached = dict.fromkeys(layers, False)
    for batch, size in zip(tiny.batches, (3, 2), strict=True):
        logits, labels = tiny.class_logits(tiny.model, batch)
        assert logits.shape == (size, 3)
        assert labels.shape == (size,)
        assert logits.isfinite().all()
        assert torch.equal(logits, tiny.class_logits(tiny.model, batch)[0])
        # The classes differ, and so do the examples: nothing is washed out on the way.
        assert (logits - logits.mean(1, keepdim=True)).abs().mean() > 0.05
        assert (logits[0] - logits[1]).abs().max() > 0.05
        gradients = torch.autograd.grad(
            (logits * torch.tensor([1.0, -2.0, 1.5])).sum(),
            [p for layer in layers.values() for p in layer],
            allow_unused=True,
        )
        values = iter(gradients)
        for name, parameters in layers.items():
            parts = [next(values) for _ in parameters]
            reached[name] |= any(part is not None and bool(part.abs().max() > 1e-6) for part in parts)
    assert all(reached.values()), reached


@pytest.mark.parametrize("family", QUICK)
def test_a_tiny_model_runs_and_its_experts_matter(family):
    check_family(family)


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in families() if family not in {*QUICK, *REFUSED}])
def test_every_other_family_runs_and_its_experts_matter(family):
    check_family(family)


@pytest.mark.parametrize("family", QUICK)
def test_several_experts_are_used(family):
    tiny = build(family)
    for name, parameters in down_proj_weights(tiny).items():
        used = set()
        for batch in tiny.batches:
            logits, _ = tiny.class_logits(tiny.model, batch)
            parts = torch.autograd.grad(logits[:, 0].sum() - logits[:, 1].sum(), parameters, allow_unused=True)
            if len(parts) > 1:
                used |= {index for index, part in enumerate(parts) if part is not None and part.abs().max() > 0}
            elif parts[0] is not None:
                used |= set(parts[0].flatten(1).abs().amax(1).nonzero().flatten().tolist())
        assert len(used) > 1, (name, used)


def test_weights_come_from_the_seed_alone():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, again, other = build("qwen3_next", seed=1), build("qwen3_next", seed=1), build("qwen3_next", seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    for one, two in zip(first.model.state_dict().values(), again.model.state_dict().values(), strict=True):
        assert torch.equal(one, two)
    assert torch.equal(first.batches[0]["input_ids"], again.batches[0]["input_ids"])
    assert not torch.equal(first.model.lm_head.weight, other.model.lm_head.weight)


def test_nothing_is_left_zero_or_constant():
    for family in ("gpt_oss", "zaya", "deepseek_v4"):
        for name, parameter in build(family).model.named_parameters():
            assert parameter.isfinite().all(), name
            assert parameter.numel() == 1 or parameter.std() > 0.02, name
    biases = [b for n, b in build("glm4_moe").model.named_buffers() if n.endswith("e_score_correction_bias")]
    assert biases
    assert all(bias.abs().min() > 0 for bias in biases)


def test_padding_does_not_move_the_logits():
    tiny = build("mixtral")
    padded = tiny.batches[1]
    mask = padded["attention_mask"]
    assert mask[1].tolist() == [0, 0, 1, 1, 1]
    alone = {"input_ids": padded["input_ids"][1:, 2:], "labels": padded["labels"][1:]}
    torch.testing.assert_close(tiny.class_logits(tiny.model, alone)[0], tiny.class_logits(tiny.model, padded)[0][1:])


def test_layers_of_every_kind_are_there():
    assert build("qwen3_next").model.config.layer_types == ["linear_attention", "full_attention", "linear_attention"]
    dense, sparse = build("deepseek_v3").model.model.layers[:2]
    assert not hasattr(dense.mlp, "experts")
    assert sparse.mlp.experts.down_proj.shape == (4, 16, 12)
    assert build("gpt_oss").model.model.layers[0].mlp.experts.down_proj.shape == (4, 24, 16)


def test_this_library_s_own_family():
    model = build("bmoe_lightning.deepseek_moe").model
    assert type(model) is DeepseekForCausalLM
    dense, sparse = model.model.layers[:2]
    assert not hasattr(dense.mlp, "experts")
    assert sparse.mlp.experts.down_proj.shape == (4, 16, 12)
    assert sparse.mlp.shared_experts is not None


class TestWrappers:
    @pytest.mark.parametrize("family", WRAPPED)
    def test_both_are_built(self, family):
        text, wrapper = build(family), build(family, wrapper=True)
        assert (text.wrapper, wrapper.wrapper) == (False, True)
        assert type(wrapper.model).__name__ == wrapper_name(family)
        # The same language model, and a tower that text leaves alone.
        inner = type(wrapper.model.config.get_text_config(decoder=True))
        assert inner is type(text.model.config)
        assert wrapper.model.config.get_text_config().num_hidden_layers == text.model.config.num_hidden_layers
        assert sum(p.numel() for p in wrapper.model.parameters()) > sum(p.numel() for p in text.model.parameters())
        logits, _ = wrapper.class_logits(wrapper.model, wrapper.batches[0])
        assert (logits - logits.mean(1, keepdim=True)).abs().mean() > 0.05

    @pytest.mark.parametrize("family", ["mixtral", "glm4v_moe", "dbrx", "nllb_moe"])
    def test_a_family_without_another(self, family):
        assert wrapper_name(family) is None
        with pytest.raises(ValueError, match="no multimodal wrapper beside"):
            build(family, wrapper=True)

    def test_which_are_wrappers_themselves(self):
        assert build("glm4v_moe").wrapper
        assert build("qwen3_omni_moe").wrapper
        assert not build("dbrx").wrapper
        assert not build("nllb_moe").wrapper


@pytest.mark.parametrize(("family", "reason"), REFUSED.items())
def test_a_family_that_cannot_be_built_says_why(family, reason):
    with pytest.raises(CannotBuildError, match=reason):
        build(family)


def test_a_configuration_that_fails_is_a_reason(monkeypatch):
    monkeypatch.setitem(OVERRIDES, "mixtral", type(OVERRIDES["doge"])(config={"hidden_size": "wide"}))
    with pytest.raises(CannotBuildError, match=r"no small configuration is known: .*hidden_size"):
        build("mixtral")


def test_broken_weights_are_a_reason(monkeypatch):
    monkeypatch.setattr("recipes.supported_models.tiny._WEIGHT_STD", float("nan"))
    with pytest.raises(CannotBuildError, match="not finite"):
        build("mixtral")


def test_unknown_families_are_refused():
    with pytest.raises(ValueError, match="'bert' is no MoE family"):
        build("bert")
    with pytest.raises(ValueError, match=r"'bert' is no MoE family.*mixtral"):
        uses_interface("bert")


def test_the_catalogue_finds_both_kinds():
    found = families_of_transformers()
    assert found == sorted(found)
    assert not any(map(is_own, found))
    interface = {family for family in found if uses_interface(family)}
    assert {"mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "jamba", "nemotron_h", "gemma4", "zaya"} <= interface
    own = set(found) - interface
    assert {"dbrx", "llama4", "jetmoe", "longcat_flash", "switch_transformers", "nllb_moe", "doge"} <= own
    # An action expert, a layer that could be sparse but never is, and a wrapper of any language model.
    assert not {"pi0", "bamba", "llava", "vitpose", "bert"} & set(found)


def test_own_families_stand_apart(monkeypatch, tmp_path):
    assert own_families() == ["bmoe_lightning.deepseek_moe"]
    assert families() == [*families_of_transformers(), *own_families()]
    assert uses_interface("bmoe_lightning.deepseek_moe")
    # A later transformers may have a family of the same name.
    (tmp_path / "deepseek_moe").mkdir()
    (tmp_path / "deepseek_moe" / "modeling_deepseek_moe.py").write_text(CLASS + "nn.Parameter(zeros(c.num_experts))")
    monkeypatch.setattr(catalogue, "_models_folder", lambda: tmp_path)
    assert families() == ["deepseek_moe", "bmoe_lightning.deepseek_moe"]
    assert [uses_interface(family) for family in families()] == [False, True]
    modules = ["transformers.models.deepseek_moe.modeling_deepseek_moe", "bmoe_lightning.models.deepseek_moe"]
    assert list(map(catalogue.module_of, families())) == modules


def test_every_override_is_of_a_family():
    assert set(OVERRIDES) <= set(families())


CLASS = "class A(nn.Module):\n    def __init__(self, c):\n        "


@pytest.mark.parametrize(
    ("source", "interface"),
    [
        ("@use_experts_implementation\nclass AExperts(nn.Module):\n    pass", True),
        ("@use_experts_implementation(is_transposed=True)\nclass AExperts(nn.Module):\n    pass", True),
        ("@moe.use_experts_implementation()\nclass AExperts(nn.Module):\n    pass", True),
        (CLASS + "self.w = nn.Parameter(torch.empty(c.num_experts, 2))", False),
        (CLASS + "self.e = nn.Embedding(self.num_local_experts, 2)", False),
        (CLASS + "for _ in range(c.n_routed_experts):\n            self.append(B())", False),
        ("# experts\nfrom ..mixtral.modeling_mixtral import MixtralSparseMoeBlock", False),
    ],
)
def test_rules_on_source_text(tmp_path, source, interface):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "modeling_a.py").write_text(source)
    assert catalogue._scan(tmp_path) == {"a": interface}


@pytest.mark.parametrize(
    "source",
    [
        CLASS + "self.w = nn.Linear(c.expert_hidden_size, 2)  # experts",
        CLASS + "self.num_experts = c.num_experts",
        CLASS.replace("__init__", "forward") + "return torch.zeros(c.num_experts)",
        "# experts\nfrom ..mixtral.configuration_mixtral import MixtralConfig",
    ],
)
def test_what_is_no_family(tmp_path, source):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "modeling_a.py").write_text(source)
    with pytest.raises(RuntimeError, match="no MoE family was found"):
        catalogue._scan(tmp_path)
