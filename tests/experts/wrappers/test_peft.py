"""Adapters of PEFT: the posterior is that of the model with the adapters merged."""

import copy

import pytest
import torch
from oracles.cases import covariance
from oracles.models import answer_logits, as_modules, tiny_qwen, toy_batch, toy_model
from oracles.own_models import (
    assert_exact,
)

from bmoe_lightning.curvature import LoRALayers, collect_factors
from bmoe_lightning.experts import (
    down_proj_parameters,
    down_proj_weights,
    expert_dropout,
    find_expert_layers,
    find_linear_layers,
    squared_distances,
)
from bmoe_lightning.experts.discovery import locate_expert_layers
from bmoe_lightning.experts.wrappers.names import plain_name
from bmoe_lightning.experts.wrappers.peft import (
    BASE_LAYER,
    MODULES_TO_SAVE,
    ORIGINAL_MODULE,
    adapted_parameter,
    has_lora_variant,
    has_parameter_deltas,
    lora_dropouts,
    lora_matrices,
    parameter_deltas,
    saved_copy,
)
from bmoe_lightning.laplace import LaplacePosterior
from recipes.supported_models.tiny import build

peft = pytest.importorskip("peft")

BATCH = toy_batch()


# PEFT asks transformers by names that it is about to rename.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def adapted(model, **options):
    """The model under randomly drawn adapters of PEFT."""
    kind = options.pop("kind", "LoraConfig")
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = peft.get_peft_model(model, getattr(peft, kind)(**options))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "modules_to_save" not in name:
                parameter.data = torch.randn_like(parameter) * 0.4
    return model.double().eval()


VARIANTS = {
    "lora": {"target_modules": ["fall"], "r": 2},
    "dropout": {"target_modules": ["fall"], "r": 2, "lora_dropout": 0.5},
    "everywhere": {"target_modules": "all-linear", "r": 4},
    "dora": {"target_modules": ["fall"], "r": 2, "use_dora": True},
    "ia3": {"kind": "IA3Config", "target_modules": ["fall"], "feedforward_modules": ["fall"]},
    "loha": {"kind": "LoHaConfig", "target_modules": ["fall"], "r": 2},
}


class TestAdaptersOfLinearLayers:
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_as_if_merged(self, variant):
        """What is tapped is the whole layer, so the covariance is that of the model with the adapters merged in."""
        model = adapted(as_modules(toy_model()), **VARIANTS[variant])
        layers = find_expert_layers(model)
        assert [(layer.down_proj, layer.d_in, layer.d_out) for layer in layers] == [("fall", 5, 6)] * 2
        logits = answer_logits(model, BATCH)[0]
        found, weights = covariance(model), [down_proj_weights(model, layer) for layer in layers]
        distances = squared_distances(model, layers, None)
        merged = copy.deepcopy(model).merge_and_unload().eval()
        torch.testing.assert_close(answer_logits(merged, BATCH)[0], logits, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found, covariance(merged), rtol=1e-8, atol=1e-11)
        located = locate_expert_layers(merged, layers)
        for layer, here, distance in zip(located, weights, distances, strict=True):
            plain = down_proj_weights(merged, layer)
            assert [plain_name(name).removeprefix("base_model.model.") for name in here] == list(plain)
            for one, other in zip(here.values(), plain.values(), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(distance, torch.stack([w.square().sum() for w in plain.values()]))

    def test_the_posterior_is_of_the_adapted_weights_and_says_so_when_they_are_merged(self):
        model = adapted(as_modules(toy_model()), **VARIANTS["lora"])
        posterior = LaplacePosterior(collect_factors(model, answer_logits, [BATCH], rank=3))
        before = posterior.predict(model, answer_logits, BATCH)
        torch.testing.assert_close(posterior.predict(model, answer_logits, BATCH), before)
        with torch.no_grad():
            next(p for name, p in model.named_parameters() if "lora_A" in name).add_(1)
        with pytest.raises(RuntimeError, match="fitted to other weights"):
            posterior.predict(model, answer_logits, BATCH)

    def test_disabled_adapters_add_nothing(self):
        base = as_modules(toy_model())
        expected = [w.clone() for w in down_proj_weights(base, find_expert_layers(base)[0]).values()]
        model = adapted(base, **VARIANTS["lora"])
        layer = find_expert_layers(model)[0]
        with model.disable_adapter():
            found = list(down_proj_weights(model, layer).values())
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)

    def test_reading_a_weight_leaves_modes_alone(self):
        model = adapted(as_modules(toy_model()), **VARIANTS["dropout"]).train()
        modes = [module.training for module in model.modules()]
        state = torch.get_rng_state()
        layer = find_expert_layers(model)[0]
        first, second = down_proj_weights(model, layer), down_proj_weights(model, layer)
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert [module.training for module in model.modules()] == modes
        assert torch.equal(torch.get_rng_state(), state)

    def test_the_matrices_of_lora_as_layers(self):
        """What Bayesian-LoRA needs: a posterior over A and B."""
        model = adapted(toy_model(), target_modules=["query", "value"], r=2)
        layers = find_linear_layers(model, "*.lora_[AB].default")
        assert [(layer.d_in, layer.d_out) for layer in layers] == [(6, 2), (2, 6)] * 4
        assert_exact(model, layers)
        assert len(find_linear_layers(model, "*.query*")) == 2 * 3  # the layer, A and B; not the layer twice

    def test_variants_that_run_the_matrices_otherwise_are_refused(self):
        model = adapted(toy_model(), target_modules=["query"], r=2, use_dora=True)
        with pytest.raises(ValueError, match="belongs to a variant of LoRA"):
            find_linear_layers(model, "*.lora_A.*")


class TestMatricesOfLoRA:
    """Those that run: of active adapters, not merged."""

    NAMES = tuple(f"base_model.model.layers.{i}.query.lora_{m}.default" for i in (0, 1) for m in "AB")

    def test_names_in_order(self):
        model = adapted(toy_model(), target_modules=["query"], r=2)
        assert tuple(lora_matrices(model)) == self.NAMES
        assert tuple(lora_matrices(model, "A")) == self.NAMES[::2]
        assert tuple(layer.name for layer in LoRALayers("B").find(model)) == self.NAMES[1::2]
        assert lora_matrices(toy_model()) == []

    def test_other_adapters_are_left_out(self):
        model = adapted(toy_model(), target_modules=["query"], r=2)
        model.add_adapter("other", peft.LoraConfig(target_modules=["key"], r=3))
        assert tuple(lora_matrices(model)) == self.NAMES
        model.set_adapter("other")
        assert [layer.d_out for layer in LoRALayers("A").find(model)] == [3, 3]
        with model.disable_adapter():
            assert lora_matrices(model) == []

    def test_merged_ones_are_part_of_the_weights(self):
        model = adapted(toy_model(), target_modules=["query"], r=2)
        model.merge_adapter()
        with pytest.raises(ValueError, match="has no layer with an active, unmerged LoRA adapter"):
            LoRALayers().find(model)

    def test_those_that_are_no_layers_are_refused(self):
        model = adapted(toy_model(), target_modules=["words", "query"], r=2)
        with pytest.raises(ValueError, match=r"adapts the embedding 'base_model\.model\.words'"):
            LoRALayers().find(model)
        model = adapted(toy_model(), target_modules=["query"], r=2, use_dora=True)
        with pytest.raises(ValueError, match="belongs to a variant of LoRA"):
            LoRALayers().find(model)
        model = adapted(tiny_qwen(), r=2, target_modules=[], target_parameters=["experts.down_proj"])
        with pytest.raises(ValueError, match=r"adapts a parameter \(target_parameters\)"):
            LoRALayers().find(model)
        with pytest.raises(ValueError, match="unknown matrices 'C' of LoRA"):
            LoRALayers("C")

    def test_dropout(self):
        model = adapted(toy_model(), target_modules=["query"], r=2, lora_dropout=0.3)
        names = [f"base_model.model.layers.{i}.query" for i in (0, 1)]
        assert lora_dropouts(model) == dict.fromkeys(names, 0.3)
        assert set(lora_dropouts(adapted(toy_model(), target_modules=["query"], r=2)).values()) == {0.0}
        assert lora_dropouts(toy_model()) == {}


class TestAdaptersOfWholeParameters:
    """PEFT's way with fused experts."""

    def model(self):
        return adapted(
            tiny_qwen(), r=2, target_modules=[], target_parameters=["experts.down_proj", "experts.gate_up_proj"]
        )

    def test_as_if_merged(self):
        model = self.model()
        layers = find_expert_layers(model)
        assert [layer.layout for layer in layers] == ["fused"] * 2
        found, weights = covariance(model), [down_proj_weights(model, layer) for layer in layers]
        merged = copy.deepcopy(model).merge_and_unload().eval()
        torch.testing.assert_close(found, covariance(merged), rtol=1e-6, atol=1e-9)
        for layer, here in zip(locate_expert_layers(merged, layers), weights, strict=True):
            (one,), (other,) = here.values(), down_proj_weights(merged, layer).values()
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)

    def test_dropout_reaches_them(self):
        model = self.model()
        plain = answer_logits(model, BATCH)[0]
        with expert_dropout(model, find_expert_layers(model), 0.5, seed=0):
            assert not torch.allclose(answer_logits(model, BATCH)[0], plain)
        torch.testing.assert_close(answer_logits(model, BATCH)[0], plain)

    def test_their_matrices_are_no_layers(self):
        with pytest.raises(ValueError, match=r"adapts a parameter \(target_parameters\)"):
            find_linear_layers(self.model(), "*.lora_A.default")


def test_adapters_of_the_parameters_of_registered_experts():
    model = adapted(build("step3p7").model, r=2, target_modules=[], target_parameters=["experts.down_proj"])
    layers = find_expert_layers(model)
    assert {layer.layout for layer in layers} == {"adapted"}
    weights = [down_proj_weights(model, layer) for layer in layers]
    tiny = build("step3p7")
    found = collect_factors(model, tiny.class_logits, tiny.batches, rank=3, layers=layers)
    merged = copy.deepcopy(model).merge_and_unload().eval()
    plain = locate_expert_layers(merged, layers)
    expected = collect_factors(merged, tiny.class_logits, tiny.batches, rank=3, layers=plain)
    for layer, other, here, place in zip(found.layers, expected.layers, weights, plain, strict=True):
        torch.testing.assert_close(layer.g_trace, other.g_trace, rtol=1e-5, atol=0)
        (one,), (two,) = here.values(), down_proj_weights(merged, place).values()
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-8)


def test_what_peft_saves_in_full_is_the_copy_in_use():
    model = adapted(toy_model(), target_modules=["query"], modules_to_save=["head"])
    (layer,) = find_linear_layers(model, "*head*")
    copies = [p for name, p in model.named_parameters() if "head.modules_to_save.default" in name]
    copies[0].data.mul_(2)
    assert [id(p) for p in down_proj_parameters(model, layer).values()] == [id(copies[0])]
    torch.testing.assert_close(next(iter(down_proj_weights(model, layer).values())), copies[0].detach())


class TestPrivateNames:
    """What is read of PEFT is there, in the installed release."""

    def test_adapter_layers(self):
        model = adapted(toy_model(), target_modules=["query"], r=2)
        layer = model.get_submodule("base_model.model.layers.0.query")
        assert BASE_LAYER in dict(layer.named_children())
        assert not layer.lora_variant
        assert not has_lora_variant(layer)
        assert adapted_parameter(layer) is None
        variant = adapted(toy_model(), target_modules=["query"], r=2, use_dora=True)
        assert has_lora_variant(variant.get_submodule("base_model.model.layers.0.query"))

    def test_modules_that_are_saved(self):
        model = adapted(toy_model(), target_modules=["query"], modules_to_save=["head"])
        wrapper = model.get_submodule("base_model.model.head")
        assert {ORIGINAL_MODULE, MODULES_TO_SAVE} <= set(dict(wrapper.named_children()))
        assert saved_copy(wrapper) == "modules_to_save.default"
        assert saved_copy(wrapper.original_module) is None
        with model.disable_adapter():
            assert saved_copy(wrapper) is None

    def test_adapters_of_whole_parameters(self):
        model = adapted(tiny_qwen(), r=2, target_modules=[], target_parameters=["experts.down_proj"])
        wrapper = model.get_submodule("base_model.model.model.layers.0.mlp.experts")
        assert adapted_parameter(wrapper) == "down_proj"
        assert has_parameter_deltas(wrapper)
        (delta,) = parameter_deltas(wrapper)
        assert delta.shape == wrapper.get_base_layer().down_proj.shape
        assert not delta.requires_grad
        with model.disable_adapter():
            assert not has_parameter_deltas(wrapper)
            assert parameter_deltas(wrapper) == []
