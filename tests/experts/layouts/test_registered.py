"""Experts of registered classes, each held against the dense oracle that watches the model's own code."""

import re
from pathlib import Path

import pytest
import torch
from oracles.models import ToyMoE, answer_logits
from oracles.own_models import (
    BATCHES,
    Buffers,
    MoreBuffers,
    assert_exact,
    buffers_forward,
    with_mixtures,
)
from torch import nn

from bmoe_lightning.curvature import collect_factors
from bmoe_lightning.experts import (
    expert_parameters,
    find_expert_layers,
    register_experts,
    tapped_batch,
)
from bmoe_lightning.experts.layouts.registered import adapter_of
from bmoe_lightning.laplace import LaplacePosterior


@pytest.mark.parametrize("kind", [Buffers, MoreBuffers])
def test_a_registered_layout(kind):
    model = with_mixtures(kind)
    own = [layer.mixture.forward for layer in model.layers]
    layers = find_expert_layers(model)
    assert [(x.layout, x.down_proj, x.num_experts, x.d_in, x.d_out, x.transposed) for x in layers] == [
        ("adapted", "second", 4, 5, 6, True)
    ] * 2
    assert_exact(model, layers)
    assert [layer.mixture.forward for layer in model.layers] == own
    assert all("forward" not in vars(layer.mixture) for layer in model.layers)
    assert list(expert_parameters(model, layers[0])) == [
        f"layers.0.mixture.{name}" for name in ("first", "second", "second_bias")
    ]


def test_a_forward_replaced_on_the_module_is_refused():
    """The registered one would pass it by."""
    model = with_mixtures(Buffers)
    mixture = model.layers[0].mixture
    mixture.forward = wrapped = lambda x: Buffers.forward(mixture, x)
    with pytest.raises(ValueError, match=r"forward of the experts 'layers.0.mixture' was replaced on the instance"):
        collect_factors(model, answer_logits, BATCHES)
    assert mixture.forward is wrapped


def test_an_exception_puts_the_forward_back():
    model = with_mixtures(Buffers)

    def broken(m, batch):
        answer_logits(m, batch)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        collect_factors(model, broken, BATCHES)
    assert all("forward" not in vars(layer.mixture) for layer in model.layers)


def test_registering_another_forward_is_refused():
    register_experts(
        Buffers, down_proj="second", transposed=True, expert_parameters=("first", "second", "second_bias")
    )(buffers_forward)  # a cell of a notebook that ran again
    with pytest.raises(ValueError, match=r"own_models.Buffers' are registered already, by <function buffers_fo"):
        register_experts(Buffers, down_proj="second")(lambda self, down_proj, x: x)
    with pytest.raises(TypeError, match="takes a class of modules or its name, got <function"):
        register_experts(buffers_forward, down_proj="second")
    with pytest.raises(ValueError, match="'Buffers' is no qualified name"):
        register_experts("Buffers", down_proj="second")


class Shifted(Buffers):
    def forward(self, x):
        return super().forward(x) + x


def test_a_subclass_with_a_forward_of_its_own_is_refused():
    with pytest.raises(
        ValueError, match=r"'layers.0.mixture' of Shifted are not supported: it overrides the registered forward of"
    ):
        find_expert_layers(with_mixtures(Shifted))


def test_a_local_class_of_the_same_name_is_another():
    class Inner(Buffers):
        pass

    def make():
        class Local(nn.Module):
            def __init__(self):
                super().__init__()
                self.down = nn.Parameter(torch.randn(4, 6, 5))

            def forward(self, x):
                return x

        return Local

    first, second = make(), make()
    register_experts(first, down_proj="down")(lambda self, down_proj, x: x)
    assert adapter_of(first()) is not None
    assert adapter_of(second()) is None


class SquareExperts(nn.Module):
    """Nothing in the shapes tells which way round the second weight is."""

    def __init__(self):
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(4, 6, 6))
        self.w2 = nn.Parameter(torch.randn(4, 6, 6))

    def forward(self, x, index):
        return torch.stack([torch.relu(t @ self.w1[e]) @ self.w2[e] for t, e in zip(x, index.tolist(), strict=True)])


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ("transposed", RuntimeError, "does not compute what its own forward does: norms .* Is down_proj transposed"),
        ("sizes", ValueError, r"takes activations \[S, 6\].*got \(\d+, 5\)"),
        ("experts", ValueError, r"int64 experts \[S\], got .* torch.int32"),
        ("tokens", ValueError, r"got \d+ slots, experts \(\d+,\) and tokens \(3,\)"),
        ("names", ValueError, "do not match their registration"),
    ],
)
def test_wrong_registrations_are_noticed(wrong, error, message):
    class Local(SquareExperts):
        def forward(self, x, index):
            return SquareExperts.forward(self, x, index)

    class Mixture(MyMixture):
        def __init__(self):
            super().__init__()
            self.experts = Local()

    @register_experts(Local, down_proj="w3" if wrong == "names" else "w2", transposed=wrong != "transposed")
    def forward(self, down_proj, x, index):
        hidden = torch.stack([torch.relu(t @ self.w1[e]) for t, e in zip(x, index.tolist(), strict=True)])
        hidden = hidden[:, :5] if wrong == "sizes" else hidden
        tokens = torch.arange(3) if wrong == "tokens" else None
        return down_proj(hidden, index.int() if wrong == "experts" else index, tokens, len(x))

    with pytest.raises(error, match=message):
        collect_factors(with_mixtures(Mixture), answer_logits, BATCHES)


def test_a_posterior_over_a_registered_layout_is_found_again(tmp_path):
    model = with_mixtures(Buffers)
    factors = collect_factors(model, answer_logits, BATCHES, rank=4)
    LaplacePosterior(factors).save(tmp_path / "posterior.safetensors")
    outer = nn.ModuleDict({"inner": model})
    loaded = LaplacePosterior.load(tmp_path / "posterior.safetensors")
    found = loaded.predict(outer, lambda m, b: answer_logits(m["inner"], b), BATCHES[0])
    torch.testing.assert_close(found, LaplacePosterior(factors).predict(model, answer_logits, BATCHES[0]))
    assert isinstance(model, ToyMoE)


class MyExperts(nn.Module):
    def __init__(self, num_experts=4):
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(num_experts, 6, 5) * 0.6)
        self.w2 = nn.Parameter(torch.randn(num_experts, 5, 6) * 0.6)

    def forward(self, x, index):
        total = torch.zeros_like(x)
        for expert in range(len(self.w1)):
            tokens = (index == expert).nonzero().squeeze(1)
            total = total.index_add(0, tokens, torch.relu(x[tokens] @ self.w1[expert]) @ self.w2[expert])
        return total


class MyMixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.router = nn.Linear(6, 4, bias=False)
        self.experts = MyExperts()

    def forward(self, x):
        tokens = x.flatten(0, 1)
        weights, index = self.router(tokens).softmax(-1).max(-1)
        return (self.experts(tokens, index) * weights.unsqueeze(1)).view_as(x)


def test_the_example_of_the_docs():
    text = (Path(__file__).parents[3] / "docs" / "adding_a_model_layout.md").read_text()
    (block,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "@register_experts" in block)
    assert len(block.splitlines()) < 20
    exec(block, {"MyExperts": MyExperts, "__name__": __name__})
    model = with_mixtures(MyMixture)
    layers = find_expert_layers(model)
    assert [(layer.name, layer.layout) for layer in layers] == [
        (f"layers.{i}.mixture.experts", "adapted") for i in range(2)
    ]
    assert_exact(model, layers)
    with tapped_batch(model, layers, answer_logits, BATCHES[0]) as tapped:
        assert tapped.taps.slots(0).rows is not None
