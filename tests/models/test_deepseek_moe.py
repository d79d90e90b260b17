import json
import sys

import pytest
import torch
from oracles.deepseek_reference import (
    PUBLISHED,
    SMALL,
    left_padded,
    plain_logits,
    published_shapes,
    random_tensors,
    read_folder,
    write_folder,
)
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as token_models
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from bmoe_lightning.data.tokenizer import train_word_tokenizer
from bmoe_lightning.experts.discovery import find_expert_layers
from bmoe_lightning.finetuner import ExpertFinetuner
from bmoe_lightning.models import DeepseekForCausalLM, DeepseekModel, DeepseekMoeConfig, register_models
from bmoe_lightning.models.loading import ModelUnavailableError, load_causal_model, load_tokenizer


def model_logits(model, ids, mask):
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, position_ids=positions).logits


VARIANTS = {
    "published": {},
    "normalised": {"norm_topk_prob": True},
    "one expert a token": {"norm_topk_prob": True, "num_experts_per_tok": 1},
    "no shared experts": {"n_shared_experts": None},
    "every second layer sparse": {"moe_layer_freq": 2, "num_hidden_layers": 4},
    "two dense layers": {"first_k_dense_replace": 2},
    "grouped keys and biases": {"num_key_value_heads": 2, "attention_bias": True},
    "linear rope": {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 500.0},
}


@pytest.fixture
def tensors():
    return random_tensors(SMALL)


@pytest.fixture
def folder(tmp_path, tensors):
    return write_folder(tmp_path / "published", SMALL, tensors)


def test_a_llama_model_of_the_process_does_not_take_its_experts_implementations_away(folder):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=30, **sizes))
    load_causal_model(str(folder), "float32").set_experts_implementation("grouped_mm")


# transformers takes norms, rotations and softmax in float32 even in a model of float64; grouped products want float32.
@pytest.mark.parametrize(("implementation", "dtype"), [("eager", "auto"), ("grouped_mm", "float32")])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_the_architecture(tmp_path, variant, implementation, dtype):
    config = SMALL | VARIANTS[variant]
    weights = random_tensors(config)
    model = load_causal_model(str(write_folder(tmp_path / "published", config, weights)), dtype)
    assert model.dtype == (torch.float64 if dtype == "auto" else torch.float32)
    assert not model.training
    model.set_experts_implementation(implementation)
    ids, mask = left_padded(config["vocab_size"])
    expected = plain_logits(config, weights, ids, mask)[mask.bool()]
    found = model_logits(model, ids, mask)[mask.bool()]
    assert expected.std() > 0.5
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5 if dtype == "auto" else 1e-4)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in ("published", "grouped keys and biases")])
def test_the_reference_tells_the_variants_apart(variant):
    everything = SMALL | {"num_hidden_layers": 4, "first_k_dense_replace": 0}
    pool = random_tensors(everything) | random_tensors(everything | {"first_k_dense_replace": 4}, seed=1)
    ids, mask = left_padded(SMALL["vocab_size"])
    found = [
        plain_logits(config, {name: pool[name] for name in published_shapes(config)}, ids, mask)[mask.bool()]
        for config in (SMALL, SMALL | VARIANTS[variant])
    ]
    assert (found[0] - found[1]).abs().max() > 0.01


def test_generates_with_a_cache_what_it_computes_without(folder):
    model = load_causal_model(str(folder), "float32")
    ids, mask = left_padded(30)
    options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached, plain = (model.generate(ids, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, plain)


def test_names_and_shapes_of_a_saved_model_are_the_published_ones(folder, tensors, tmp_path):
    model = load_causal_model(str(folder))
    model.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    saved = read_folder(tmp_path / "again")
    assert saved.keys() == tensors.keys()
    assert all(torch.equal(saved[name], value) for name, value in tensors.items())
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("deepseek", ["DeepseekForCausalLM"])
    again = load_causal_model(str(tmp_path / "again")).state_dict()
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())


def test_the_published_configuration_has_16_billion_parameters():
    register_models()
    config = AutoConfig.for_model(**PUBLISHED)
    assert isinstance(config, DeepseekMoeConfig)
    assert config.dtype == torch.bfloat16
    assert config.rope_parameters["rope_theta"] == 10000
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    expected = sum(torch.Size(shape).numel() for shape in published_shapes(PUBLISHED).values())
    assert 16.3e9 < expected < 16.5e9
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    layers = find_expert_layers(model)
    assert [layer.name for layer in layers] == [f"model.layers.{index}.mlp.experts" for index in range(1, 28)]
    assert {(layer.num_experts, layer.d_in, layer.d_out) for layer in layers} == {(64, 1408, 2048)}
    assert {layer.layout for layer in layers} == {"fused"}


def test_the_defaults_are_the_published_values():
    default = DeepseekMoeConfig()
    fields = PUBLISHED.keys() - {"architectures", "auto_map", "rope_scaling", "rope_theta", "torch_dtype"}
    fields -= {"transformers_version"}
    assert {name: getattr(default, name) for name in fields} == {name: PUBLISHED[name] for name in fields}


def test_a_fresh_model_is_initialised_everywhere():
    config = DeepseekMoeConfig(**{**SMALL, "initializer_range": 0.5, "torch_dtype": "float32"})
    model = DeepseekForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == 1).all()
        else:
            assert parameter.std().item() == pytest.approx(0.5, rel=0.35), name


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
def test_trains_with_gradient_checkpointing(folder):
    model = load_causal_model(str(folder), "float32").train()
    ids, mask = left_padded(30)
    gradients = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0])
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two)


def test_the_finetuner_takes_the_folder(folder):
    module = ExpertFinetuner(str(folder), answer_token_ids=[3, 4], dtype="float32")
    module.configure_model()
    assert set(module.trained_parameters()) == {
        f"model.model.layers.{layer}.mlp.experts.{name}" for layer in (1, 2) for name in ("gate_up_proj", "down_proj")
    }
    ids, mask = left_padded(30)
    logits, _ = module.class_logits({"input_ids": ids, "attention_mask": mask})
    expected = plain_logits(SMALL, random_tensors(SMALL), ids, mask)[:, -1, [3, 4]]
    torch.testing.assert_close(logits.detach().double(), expected, rtol=0, atol=1e-4)


def test_code_of_the_folder_is_never_run_and_nobody_is_asked(folder, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    assert type(load_causal_model(str(folder))) is DeepseekForCausalLM
    train_word_tokenizer(["Answer: A B"], max_vocab=30).save_pretrained(folder)
    load_tokenizer(str(folder))
    assert not any("deepseek" in name and name.startswith("transformers_modules") for name in sys.modules)


def lacking(part):
    return lambda tensors: {name: value for name, value in tensors.items() if part not in name}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lacking("layers.2.mlp.experts.4."), r"layers\.2\.mlp\.experts\.down_proj \(shape \[4, 16, 8\] in the files"),
        (lacking("layers.2.mlp.experts.1.down_proj"), r"layers\.2\.mlp\.experts\.down_proj \(shape \[4, 16, 8\]"),
        (lacking("layers.2.mlp.experts.1.up_proj"), "lacks a matrix of an expert"),
        (lacking("layers.2.mlp.experts"), r"layers\.2\.mlp\.experts\.down_proj"),
        (lacking("layers.1.mlp.gate.weight"), r"layers\.1\.mlp\.gate\.weight"),
        (lacking("layers.1.mlp.shared_experts.down_proj"), r"layers\.1\.mlp\.shared_experts\.down_proj"),
        (lacking("lm_head"), "lm_head"),
        (
            lambda tensors: (
                tensors
                | {
                    name.replace("experts.4", "experts.5"): value
                    for name, value in tensors.items()
                    if "layers.1.mlp.experts.4" in name
                }
            ),
            r"shape \[6, 16, 8\] in the files, \[5, 16, 8\] in the model",
        ),
    ],
)
def test_a_checkpoint_that_lacks_weights_or_has_too_many_experts_is_refused(tmp_path, tensors, change, says):
    folder = write_folder(tmp_path / "broken", SMALL, change(tensors))
    with pytest.raises(ModelUnavailableError, match=says):
        load_causal_model(str(folder))


def test_surplus_tensors_are_named(tmp_path, tensors):
    surplus = tensors | {"model.layers.0.self_attn.q_proj.bias": torch.ones(16, dtype=torch.float64)}
    folder = write_folder(tmp_path / "surplus", SMALL, surplus)
    with pytest.warns(UserWarning, match=r"no place for 1 .*layers\.0\.self_attn\.q_proj\.bias"):
        load_causal_model(str(folder))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"scoring_func": "sigmoid"}, "scoring_func 'sigmoid'; implemented is 'softmax'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling of type 'dynamic'.*'default' or 'linear'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling of type 'yarn'"),
        ({"mlp_bias": True}, "mlp_bias True"),
        ({"n_routed_experts": None}, "n_routed_experts.* expected int, got NoneType"),
        ({"moe_layer_freq": 0}, "moe_layer_freq .* 1 or more, got 0"),
        ({"first_k_dense_replace": -1}, "first_k_dense_replace .* 0 or more, got -1"),
        ({"num_experts_per_tok": 6}, "num_experts_per_tok=6 is more than .* n_routed_experts=5"),
        ({"hidden_size": 18}, "not a multiple of the number of attention heads"),
        ({"norm_topk_prob": "yes"}, "norm_topk_prob"),
    ],
)
def test_configurations_that_are_not_implemented_are_refused(tmp_path, tensors, change, says):
    folder = write_folder(tmp_path / "other", SMALL | change, tensors)
    with pytest.raises(ValueError, match=says) as caught:
        load_causal_model(str(folder))
    assert "\n" not in str(caught.value)


def test_registering_again_changes_nothing():
    register_models()
    register_models()
    assert AutoConfig.for_model("deepseek").__class__ is DeepseekMoeConfig
    with torch.device("meta"):
        assert type(AutoModel.from_config(DeepseekMoeConfig(**SMALL))) is DeepseekModel


def test_another_family_of_that_name_is_left_alone(monkeypatch):
    register_models()
    mapping = get_checkpoint_conversion_mapping("deepseek")

    class Theirs(Qwen2MoeConfig):
        model_type = "deepseek"

    monkeypatch.setitem(CONFIG_MAPPING._extra_content, "deepseek", Theirs)
    register_models()
    assert CONFIG_MAPPING["deepseek"] is Theirs
    assert len(get_checkpoint_conversion_mapping("deepseek")) == len(mapping)


def byte_level_folder(path):
    """A tokenizer like the published one: byte-level, but its class is said to be Llama's."""
    path.mkdir()
    tokenizer = Tokenizer(token_models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        ["what is this? Answer: A 12"] * 3,
        trainers.BpeTrainer(
            vocab_size=300,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=["<bos>", "<eos>"],
            show_progress=False,
        ),
    )
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<bos>", "eos_token": "<eos>", "tokenizer_class": "LlamaTokenizerFast"})
    )
    (path / "config.json").write_text(json.dumps(SMALL))
    return tokenizer


@pytest.mark.parametrize("trusts_the_class", [False, True])
def test_a_byte_level_tokenizer_keeps_its_spaces(tmp_path, monkeypatch, trusts_the_class):
    if trusts_the_class:
        monkeypatch.setattr(
            "bmoe_lightning.models.loading.AutoTokenizer.from_pretrained",
            lambda source, **options: LlamaTokenizer.from_pretrained(source),
        )
    original = byte_level_folder(tmp_path / "tokens")
    text = "what is this 12? Answer: A"
    loaded = load_tokenizer(str(tmp_path / "tokens"))
    assert isinstance(loaded, PreTrainedTokenizerFast)
    ids = loaded(text, add_special_tokens=False)["input_ids"]
    assert ids == original.encode(text).ids
    assert loaded.decode(ids) == text
    assert (loaded.bos_token, loaded.eos_token) == ("<bos>", "<eos>")
