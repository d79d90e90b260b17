"""Models that other libraries have wrapped: adapters, offloading, quantisation, parallel plans."""

import copy

import pytest
import torch
from oracles.models import answer_logits, as_modules, tiny_qwen, toy_batch, toy_model
from test_own_models import Buffers, assert_exact, with_mixtures
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import BitsAndBytesConfig, Qwen2MoeForCausalLM

from bmoe_lightning.curvature import collect_factors
from bmoe_lightning.experts import (
    down_proj_parameters,
    down_proj_weights,
    expert_dropout,
    find_expert_layers,
    find_linear_layers,
    squared_distances,
    tapped_batch,
    weight_fingerprint,
)
from bmoe_lightning.experts.discovery import locate_expert_layers
from bmoe_lightning.experts.wrappers import effective_weight, plain_name, unusable, unwrapped
from bmoe_lightning.laplace import LaplacePosterior
from recipes.supported_models.tiny import build

BATCH = toy_batch()


# PEFT asks transformers by names that it is about to rename.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def covariance(model, layers=None):
    factors = collect_factors(model, answer_logits, [BATCH], rank=3, layers=layers)
    return LaplacePosterior(factors).logit_covariance(model, answer_logits, BATCH)[1]


def adapted(model, **options):
    """The model under randomly drawn adapters of PEFT."""
    peft = pytest.importorskip("peft")
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
        with pytest.raises(RuntimeError, match="fitted on other weights"):
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
        with pytest.raises(ValueError, match="adapts a whole parameter"):
            find_linear_layers(self.model(), "*.lora_A.default")


@pytest.mark.parametrize("layout", ["fused", "modules", "registered"])
@pytest.mark.parametrize("disk", [False, True])
def test_offloaded_weights(layout, disk, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    if layout == "registered":
        model = with_mixtures(Buffers)
    else:
        model = toy_model() if layout == "fused" else as_modules(toy_model())
    layers = find_expert_layers(model)
    reference = {n: w.clone() for layer in layers for n, w in down_proj_weights(model, layer).items()}
    expected, fingerprint = covariance(model), weight_fingerprint(model, layers)
    if disk:
        accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    else:
        accelerate.cpu_offload(model, execution_device="cpu")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    layers = find_expert_layers(model)
    torch.testing.assert_close(covariance(model), expected)
    assert weight_fingerprint(model, layers) == fingerprint
    assert all(float(d.sum()) == 0 for d in squared_distances(model, layers, reference))


def test_a_family_with_an_adapter_offloaded():
    accelerate = pytest.importorskip("accelerate")
    tiny = build("step3p7")
    layers, (batch, _) = find_expert_layers(tiny.model), tiny.batches
    expected = collect_factors(tiny.model, tiny.class_logits, [batch], rank=3, layers=layers)
    accelerate.cpu_offload(tiny.model, execution_device="cpu")
    found = collect_factors(tiny.model, tiny.class_logits, [batch], rank=3)
    for layer, other in zip(found.layers, expected.layers, strict=True):
        torch.testing.assert_close(layer.g_trace, other.g_trace)
    assert found.fingerprint == expected.fingerprint


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


def test_no_weights_at_all():
    with torch.device("meta"):
        model = tiny_qwen()
    layers = find_expert_layers(model)  # what there will be can be told without weights
    with pytest.raises(ValueError, match="weights are on the meta device, where there are none"):
        squared_distances(model, layers, None)


def test_checkpoint_wrappers_change_no_names():
    model = as_modules(toy_model())
    layers, fingerprint = find_expert_layers(model), weight_fingerprint(model, find_expert_layers(model))
    expected = covariance(model)
    for expert in model.layers[0].mixture.crew:
        expert.fall = checkpoint_wrapper(expert.fall)
    model.layers[1] = checkpoint_wrapper(model.layers[1])
    wrapped = find_expert_layers(model)
    assert [layer.down_proj for layer in wrapped] == ["fall"] * 2
    assert [plain_name(layer.name) for layer in wrapped] == [layer.name for layer in layers]
    assert locate_expert_layers(model, layers) == wrapped
    assert weight_fingerprint(model, wrapped) == fingerprint
    torch.testing.assert_close(covariance(model), expected)


class PackedLinear(nn.Module):
    """A quantised layer as many libraries write it: no `nn.Linear`, no weight, packed numbers."""

    def __init__(self, linear, passes_gradient=True):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("qweight", linear.weight.detach().mul(64).round().to(torch.int8))
        self.passes_gradient = passes_gradient

    def forward(self, x):
        output = x @ (self.qweight.to(x.dtype) / 64).T
        return output if self.passes_gradient else output.detach()


class TestQuantised:
    def test_experts_that_are_packed_modules(self):
        model = as_modules(toy_model())
        for expert in model.layers[0].mixture.crew:
            expert.fall = PackedLinear(expert.fall)
        with pytest.raises(ValueError, match=r"crew.0.fall' are quantised \(NoneType\).*other layers may be quantised"):
            find_expert_layers(model)

    @pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
    def test_fused_experts_in_a_narrow_type(self, dtype):
        model = toy_model()
        crew = model.layers[0].mixture.crew
        crew.down_proj = nn.Parameter(crew.down_proj.detach().to(dtype), requires_grad=False)
        with pytest.raises(ValueError, match=rf"'layers.0.mixture.crew' are quantised \({dtype}\)"):
            find_expert_layers(model)

    def test_experts_of_a_class_of_its_own(self):
        """As MXFP4 leaves them: no experts interface, a packed attribute."""

        class Mxfp4Experts(nn.Module):
            def __init__(self):
                super().__init__()
                self.down_proj = torch.zeros(4, 6, 5, dtype=torch.uint8)

        model = nn.ModuleDict({"experts": Mxfp4Experts()})
        with pytest.raises(ValueError, match=r"'experts' are quantised \(torch.uint8\)"):
            find_expert_layers(model)

    def test_some_of_the_layers(self):
        """A part of the experts left out in silence would be no posterior over the experts."""
        model = toy_model()
        crew = model.layers[0].mixture.crew
        del crew.down_proj
        crew.down_proj = torch.zeros(4, 6, 5, dtype=torch.uint8)
        with pytest.raises(ValueError, match=r"'layers.0.mixture.crew' are quantised"):
            find_expert_layers(model)
        crew.down_proj = torch.zeros(4, 6, 5)
        with pytest.raises(ValueError, match=r"'layers.0.mixture.crew' are computed from others"):
            find_expert_layers(model)

    def test_weights_that_are_computed_from_others(self):
        model = toy_model()
        torch.nn.utils.parametrizations.weight_norm(model.layers[0].value)
        with pytest.raises(ValueError, match=r"the weight of 'layers.0.value' is computed from others"):
            find_linear_layers(model, "*.value")

    def test_what_only_looks_like_a_linear_layer(self):
        class Odd(nn.Module):
            in_features = out_features = 6

            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.zeros(6, 6))

        with pytest.raises(ValueError, match="no linear layer of ModuleDict matches"):
            find_linear_layers(nn.ModuleDict({"odd": Odd()}), "*")
        with pytest.raises(ValueError, match="or not there yet"):
            find_linear_layers(nn.ModuleDict({"lazy": nn.LazyLinear(3)}), "*")

    def test_other_layers_may_be_quantised(self):
        model = toy_model()
        rounded = toy_model()
        for layer, reference in zip(model.layers, rounded.layers, strict=True):
            layer.query = PackedLinear(layer.query)
            reference.query.weight.data = layer.query.qweight.double() / 64
        torch.testing.assert_close(covariance(model), covariance(rounded))

    def test_a_layer_that_passes_no_gradient_is_noticed(self):
        model = toy_model()
        model.layers[1].value = PackedLinear(model.layers[1].value, passes_gradient=False)
        with pytest.raises(RuntimeError, match=r"'layers.1.value' \(PackedLinear\) passes no gradient to its input"):
            covariance(model)
        with torch.no_grad():
            answer_logits(model, BATCH)  # the watch is gone

    @pytest.mark.parametrize("bits", [4, 8])
    def test_bitsandbytes_leaves_fused_experts_alone(self, bits, tmp_path):
        """Everything around the experts is quantised; the posterior is that of a model with the rounded weights."""
        pytest.importorskip("bitsandbytes")
        config = {"hidden_size": 64, "shared_expert_intermediate_size": 64}
        # A matrix of one row is more than the kernels of some CPUs can take.
        skipped = ["lm_head", *(f"model.layers.{i}.mlp.shared_expert_gate" for i in range(2))]
        tiny_qwen(dtype=torch.bfloat16, **config).save_pretrained(tmp_path)
        options = {f"load_in_{bits}bit": True, "llm_int8_skip_modules": skipped}
        model = Qwen2MoeForCausalLM.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(**options))
        kind = type(model.model.layers[0].self_attn.q_proj).__name__
        assert kind == {4: "Linear4bit", 8: "Linear8bitLt"}[bits]
        layers = find_expert_layers(model)
        assert [layer.layout for layer in layers] == ["fused"] * 2
        fingerprint = weight_fingerprint(model, layers)
        found = covariance(model)
        assert weight_fingerprint(model, layers) == fingerprint
        expected = covariance(tiny_qwen(dtype=torch.bfloat16, **config))
        assert 0.3 < float(found.diagonal(dim1=1, dim2=2).sum() / expected.diagonal(dim1=1, dim2=2).sum()) < 3
        with pytest.raises(ValueError, match=r"'model.layers.0.self_attn.q_proj' are quantised"):
            find_linear_layers(model, "*.q_proj")


@pytest.mark.parametrize("how", ["_is_expert_parallel", "_is_hooked"])
def test_parallel_plans_are_refused(how):
    model = toy_model()
    setattr(model.layers[1].mixture.crew, how, True)
    with pytest.raises(ValueError, match=r"'layers.1.mixture.crew' are spread over processes \(expert or tensor"):
        find_expert_layers(model)
    linear = toy_model()
    linear.layers[0].value._is_hooked = True
    if how == "_is_hooked":
        with pytest.raises(ValueError, match=r"'layers.0.value' is spread over processes \(tensor parallelism\)"):
            find_linear_layers(linear, "*.value")


def test_inputs_that_were_split_are_noticed():
    """By torch's own tensor parallelism, say, which leaves no mark on the modules."""
    model = toy_model()
    layers = find_linear_layers(model, "head")
    model.head.register_forward_pre_hook(lambda _, inputs: (inputs[0][..., :3],))
    model.head.weight = nn.Parameter(model.head.weight[:, :3].detach())
    with (
        pytest.raises(RuntimeError, match="'head' got 3 of their 6 inputs: they are spread over processes"),
        tapped_batch(model, layers, answer_logits, BATCH),
    ):
        pass


def test_unwrapping():
    linear = nn.Linear(3, 2)
    assert unwrapped(checkpoint_wrapper(checkpoint_wrapper(linear))) is linear
    assert plain_name("a._orig_mod.b.base_layer.base_layer.c") == "a.b.c"
    assert torch.equal(effective_weight(linear), linear.weight)
    torch.testing.assert_close(effective_weight(checkpoint_wrapper(linear)), linear.weight.detach())
    assert unusable(linear.weight) is None
    assert unusable(None) == "quantised (NoneType)"
