"""Models of users' own making, each held against the dense oracle that watches the model's own code."""

import re
from pathlib import Path

import pytest
import torch
from oracles.models import Specialist, ToyMixture, ToyMoE, answer_logits, toy_batch, toy_model
from torch import nn

from bmoe_lightning.curvature import collect_factors
from bmoe_lightning.experts import (
    down_proj_parameters,
    expert_dropout,
    expert_parameters,
    find_expert_layers,
    find_linear_layers,
    register_experts,
    tapped_batch,
)
from bmoe_lightning.experts.layouts.registered import adapter_of
from bmoe_lightning.laplace import LaplacePosterior
from recipes.supported_models.oracle import dense_factors, dense_logit_covariance, observe
from recipes.supported_models.watch import down_proj_weights

BATCHES = [toy_batch(num_rows=4, seed=1), toy_batch(num_rows=3, seed=2)]


def assert_exact(model, layers, batches=BATCHES, class_logits=answer_logits):
    """Factors and logit covariance are those of the oracle, to rounding; returns the factors."""
    weights = [down_proj_weights(model, layer) for layer in layers]
    seen = [observe(model, class_logits, batch, weights) for batch in batches]
    dense = dense_factors(seen, weights)
    factors = collect_factors(model, class_logits, batches, rank=20, sketch="exact", layers=layers)
    for layer, expected in zip(factors.layers, dense, strict=True):
        torch.testing.assert_close(layer.slots, expected.slots, rtol=0, atol=0)
        for basis, eigenvalues, factor in (
            (layer.a_basis, layer.a_eigenvalues, expected.a),
            (layer.g_basis, layer.g_eigenvalues, expected.g),
        ):
            torch.testing.assert_close((basis * eigenvalues.unsqueeze(1)) @ basis.mT, factor, rtol=1e-9, atol=1e-11)
    posterior = LaplacePosterior(factors, prior_precision=0.7)
    for batch, observation in zip(batches, seen, strict=True):
        logits, covariance = posterior.logit_covariance(model, class_logits, batch)
        torch.testing.assert_close(logits, observation.logits, rtol=1e-11, atol=1e-12)
        expected = dense_logit_covariance(observation.jacobians, dense, 0.7)
        torch.testing.assert_close(covariance, expected, rtol=1e-8, atol=1e-10)
    return factors


def with_mixtures(make, num_layers=2, seed=0):
    """A `ToyMoE` in float64 whose mixtures are of another kind."""
    model = toy_model(seed, num_layers=num_layers)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for layer in model.layers:
            layer.mixture = make().double()
    return model.eval()


class Expert(nn.Module):
    """An expert with names and biases of its own."""

    def __init__(self, width=6, inner=5):
        super().__init__()
        self.rise = nn.Linear(width, inner)
        self.land = nn.Linear(inner, width)

    def forward(self, x):
        return self.land(torch.relu(self.rise(x)))


class OwnMixture(nn.Module):
    """Top-2 routing over a list of experts; the subclasses route otherwise."""

    def __init__(self, num_experts=4):
        super().__init__()
        self.chooser = nn.Linear(6, num_experts)
        self.workers = nn.ModuleList(Expert() for _ in range(num_experts))

    def weights(self, x):
        """Routing weights `[T, E]`, zero for an expert that does not see the token."""
        values, index = self.chooser(x).softmax(-1).topk(2, dim=-1)
        return torch.zeros(len(x), len(self.workers), dtype=x.dtype).scatter(1, index, values)

    def forward(self, x):
        tokens = x.reshape(-1, x.shape[-1])
        weights = self.weights(tokens)
        total = torch.zeros_like(tokens)
        for number, worker in enumerate(self.workers):
            rows = weights[:, number].nonzero().squeeze(1)
            total = total.index_add(0, rows, worker(tokens[rows]) * weights[rows, number].unsqueeze(1))
        return total.view_as(x)


class DroppingMixture(OwnMixture):
    """Experts take three tokens each and drop what comes later."""

    def weights(self, x):
        weights = super().weights(x)
        return weights * ((weights != 0).cumsum(0) <= 3)


class ExpertChoiceMixture(OwnMixture):
    """Every expert chooses the tokens that it likes best."""

    def weights(self, x):
        scores = self.chooser(x).sigmoid()
        chosen = scores.topk(5, dim=0).indices
        return torch.zeros_like(scores).scatter(0, chosen, scores.gather(0, chosen))


class EverybodyMixture(OwnMixture):
    """No routing at all: every expert sees every token."""

    def weights(self, x):
        return self.chooser(x).softmax(-1)


class TwiceMixture(OwnMixture):
    """The same experts, called twice in one forward."""

    def forward(self, x):
        return super().forward(torch.tanh(super().forward(x)) + x)


@pytest.mark.parametrize("kind", [OwnMixture, DroppingMixture, EverybodyMixture, TwiceMixture])
def test_own_lists_of_experts(kind):
    model = with_mixtures(kind)
    layers = find_expert_layers(model)
    assert [(layer.name, layer.down_proj, layer.d_in) for layer in layers] == [
        ("layers.0.mixture.workers", "land", 5),
        ("layers.1.mixture.workers", "land", 5),
    ]
    assert_exact(model, layers)


def test_experts_that_choose_their_tokens():
    """Such a router mixes examples: which tokens an expert takes depends on the others, but not differentiably so."""
    model = with_mixtures(ExpertChoiceMixture)
    assert_exact(model, find_expert_layers(model))


def test_a_dictionary_of_experts_beside_a_dropout():
    class Named(OwnMixture):
        def __init__(self):
            super().__init__()
            workers = {f"expert_{i}": Expert() for i in range(4)}
            self.workers = nn.ModuleDict({**workers, "dropout": nn.Dropout(0.5)})

        def forward(self, x):
            tokens = x.reshape(-1, x.shape[-1])
            weights = self.weights(tokens)[:, :4]
            outputs = [self.workers["dropout"](self.workers[f"expert_{i}"](tokens)) for i in range(4)]
            return (torch.stack(outputs, 1) * weights.unsqueeze(2)).sum(1).view_as(x)

    model = with_mixtures(Named)
    layers = find_expert_layers(model)
    assert [(layer.num_experts, layer.down_proj) for layer in layers] == [(4, "land")] * 2
    assert_exact(model, layers)


def test_fused_experts_called_twice():
    model = toy_model()
    mixture = model.layers[1].mixture
    once = mixture.forward
    mixture.forward = lambda x: once(torch.tanh(once(x)) + x)
    assert_exact(model, find_expert_layers(model))


def test_a_layer_that_no_token_reaches_keeps_its_prior():
    """An image tower with experts of its own, in a model that is given text."""
    model = toy_model()
    model.tower = ToyMixture(model.config).double()
    layers = find_expert_layers(model)
    assert [layer.name for layer in layers][-1] == "tower.crew"
    batch = BATCHES[0]
    with pytest.warns(UserWarning, match=r"went through tower.crew: these layers keep their prior"):
        factors = collect_factors(model, answer_logits, [batch], rank=4, layers=layers)
    assert float(factors.layers[-1].slots.sum()) == 0
    posterior = LaplacePosterior(factors)
    _, with_tower = posterior.logit_covariance(model, answer_logits, batch)
    without = posterior.without_layers([layers[-1].index])
    torch.testing.assert_close(without.logit_covariance(model, answer_logits, batch)[1], with_tower)


@pytest.mark.parametrize("kind", ["fused", "modules"])
def test_tied_layers_are_one(kind):
    """As where an encoder and a decoder share their experts."""
    model = toy_model() if kind == "fused" else with_mixtures(OwnMixture)
    first, second = (layer.mixture for layer in model.layers)
    for name, parameter in first.named_parameters():
        owner, _, last = name.rpartition(".")
        setattr(second.get_submodule(owner), last, parameter)
    (layer,) = find_expert_layers(model)
    assert layer.name.startswith("layers.0.")
    assert down_proj_parameters(model, layer)
    factors = assert_exact(model, [layer])
    assert len(expert_parameters(model, layer)) == {"fused": 2, "modules": 16}[kind]
    untied = assert_exact(toy_model() if kind == "fused" else with_mixtures(OwnMixture), [layer])
    assert float(factors.layers[0].slots.sum()) > float(untied.layers[0].slots.sum())


def test_a_head_tied_to_the_embeddings_is_refused():
    model = toy_model()
    model.head.weight = model.words.weight
    with pytest.raises(ValueError, match=r"the weight of 'head' is tied to another module \(a head to the embeddings"):
        find_linear_layers(model, "head")


class Buffers(nn.Module):
    """All experts in two parameters, tokens in buffers of a fixed capacity; what does not fit is dropped."""

    def __init__(self, num_experts=4, width=6, inner=5, capacity=6):
        super().__init__()
        self.capacity = capacity
        self.router = nn.Linear(width, num_experts, bias=False)
        self.first = nn.Parameter(torch.randn(num_experts, width, inner) * 0.6)
        self.second = nn.Parameter(torch.randn(num_experts, inner, width) * 0.6)
        self.second_bias = nn.Parameter(torch.randn(num_experts, 1, width))

    def dispatch(self, x):
        weights, index = self.router(x).softmax(-1).max(dim=-1)
        hits = nn.functional.one_hot(index, len(self.first))
        place = (hits.cumsum(0) * hits).sum(-1) - 1
        buffers = nn.functional.one_hot(place, len(x))[:, : self.capacity].to(x.dtype)
        return hits.to(x.dtype).unsqueeze(2) * buffers.unsqueeze(1), weights  # [T, E, C], [T]

    def forward(self, x):
        tokens = x.reshape(-1, x.shape[-1])
        places, weights = self.dispatch(tokens)
        buffers = (places.flatten(1).T @ tokens).view(len(self.first), self.capacity, -1)
        hidden = torch.relu(torch.bmm(buffers, self.first))
        outputs = torch.bmm(hidden, self.second) + self.second_bias
        return ((places.flatten(1) @ outputs.flatten(0, 1)) * weights.unsqueeze(1)).view_as(x)


class MoreBuffers(Buffers):
    pass


@register_experts(Buffers, down_proj="second", transposed=True, expert_parameters=("first", "second", "second_bias"))
def buffers_forward(self, second_linear, x):
    tokens = x.reshape(-1, x.shape[-1])
    places, weights = self.dispatch(tokens)
    buffers = (places.flatten(1).T @ tokens).view(len(self.first), self.capacity, -1)
    hidden = torch.relu(torch.bmm(buffers, self.first))
    experts = torch.arange(len(self.first)).repeat_interleave(self.capacity)
    outputs = second_linear(hidden.flatten(0, 1), experts).view(*hidden.shape[:2], -1) + self.second_bias
    return ((places.flatten(1) @ outputs.flatten(0, 1)) * weights.unsqueeze(1)).view_as(x)


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
    with pytest.raises(ValueError, match=r"'layers.0.mixture' have a forward of their own"):
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
    with pytest.raises(ValueError, match=r"test_own_models.Buffers' are registered already, by <function buffers_fo"):
        register_experts(Buffers, down_proj="second")(lambda self, second_linear, x: x)
    with pytest.raises(TypeError, match="takes a class of modules or its name, got <function"):
        register_experts(buffers_forward, down_proj="second")
    with pytest.raises(ValueError, match="'Buffers' is no qualified name"):
        register_experts("Buffers", down_proj="second")


class Shifted(Buffers):
    def forward(self, x):
        return super().forward(x) + x


def test_a_subclass_with_a_forward_of_its_own_is_refused():
    with pytest.raises(
        ValueError, match=r"'layers.0.mixture' of Shifted are not supported: it has a forward of its own"
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
    register_experts(first, down_proj="down")(lambda self, second_linear, x: x)
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
        ("transposed", RuntimeError, "does not compute what its own does: norms .* Is the second weight transposed"),
        ("sizes", ValueError, r"takes activations \[S, 6\].*got \(\d+, 5\)"),
        ("experts", ValueError, r"int64 experts \[S\], got .* torch.int32"),
        ("tokens", ValueError, r"got \d+ slots, experts \(\d+,\) and tokens \(3,\)"),
        ("names", ValueError, "are not as they were registered"),
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
    def forward(self, second_linear, x, index):
        hidden = torch.stack([torch.relu(t @ self.w1[e]) for t, e in zip(x, index.tolist(), strict=True)])
        hidden = hidden[:, :5] if wrong == "sizes" else hidden
        tokens = torch.arange(3) if wrong == "tokens" else None
        return second_linear(hidden, index.int() if wrong == "experts" else index, tokens, len(x))

    with pytest.raises(error, match=message):
        collect_factors(with_mixtures(Mixture), answer_logits, BATCHES)


class InPlace(OwnMixture):
    """What comes out of an expert is changed in place."""

    def forward(self, x):
        tokens = x.reshape(-1, x.shape[-1])
        weights = self.weights(tokens)
        total = torch.zeros_like(tokens)
        for number, worker in enumerate(self.workers):
            rows = weights[:, number].nonzero().squeeze(1)
            output = worker(tokens[rows])
            output.mul_(weights[rows, number].unsqueeze(1))
            total = total.index_add(0, rows, output)
        return total.view_as(x)


def test_outputs_changed_in_place():
    model = with_mixtures(InPlace)
    expected = with_mixtures(OwnMixture)
    layers = find_expert_layers(model)
    found = collect_factors(model, answer_logits, BATCHES, rank=20)
    for layer, other in zip(found.layers, assert_exact(expected, find_expert_layers(expected)).layers, strict=True):
        torch.testing.assert_close(layer.g_trace, other.g_trace, rtol=1e-10, atol=1e-12)
    covariance = LaplacePosterior(found).logit_covariance(model, answer_logits, BATCHES[0])[1]
    plain = LaplacePosterior(collect_factors(expected, answer_logits, BATCHES, rank=20))
    torch.testing.assert_close(covariance, plain.logit_covariance(expected, answer_logits, BATCHES[0])[1])
    assert len(layers) == 2


def test_inputs_changed_in_place_are_refused():
    model = toy_model()

    def double(module, inputs, output):
        inputs[0].mul_(2)

    model.layers[1].value.register_forward_hook(double)
    layers = find_linear_layers(model, "*.value")
    with pytest.raises(RuntimeError, match=r"changes in place what the second linear layers of 'layers.1.value' got"):
        collect_factors(model, answer_logits, BATCHES, layers=layers)


def test_layers_called_by_keyword():
    model = toy_model()
    for layer in model.layers:
        own = layer.value
        layer.value = nn.Sequential(own)
        layer.value.forward = lambda x, own=own: own(input=x)
    layers = find_linear_layers(model, "*.value.0")
    assert_exact(model, layers)
    plain = answer_logits(model, BATCHES[0])[0]
    with expert_dropout(model, layers, 0.5, seed=0):
        assert not torch.allclose(answer_logits(model, BATCHES[0])[0], plain)


def test_reduce_asks_where_tokens_lie_otherwise():
    """A layer on `[length, batch]`: the places of its tokens name the wrong examples, which its gradients do not."""
    model = toy_model(num_layers=3)
    for layer in model.layers[:1]:
        own = layer.value
        layer.value = nn.Sequential(own)
        layer.value.forward = lambda x, own=own: own(x.transpose(0, 1).contiguous()).transpose(0, 1)
    batch = toy_batch(num_rows=7, length=7)
    layers = find_linear_layers(model, ["*.value", "*.value.0"])
    plain = toy_model(num_layers=3)
    found = collect_factors(model, answer_logits, [batch], rank=6, approximation="reduce", layers=layers)
    expected = collect_factors(
        plain, answer_logits, [batch], rank=6, approximation="reduce", layers=find_linear_layers(plain, "*.value")
    )
    for layer, other in zip(found.layers, expected.layers, strict=True):
        torch.testing.assert_close(layer.a_trace, other.a_trace)
        torch.testing.assert_close(layer.g_trace, other.g_trace)


def test_weights_that_are_multiplied_without_their_layer():
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
            self.direct = nn.Linear(6, 6)

        def forward(self, x):
            x = self.attention(x, x, x, need_weights=False)[0]
            return x + nn.functional.linear(x, self.direct.weight)

    model = with_mixtures(Attending)
    with pytest.raises(ValueError, match=r"'layers.0.mixture.attention.out_proj' belongs to an nn.MultiheadAttention"):
        find_linear_layers(model, "*.out_proj")
    layers = find_linear_layers(model, ["*.direct", "*.value"])
    with pytest.warns(UserWarning, match=r"no token that moves a logit went through layers.0.mixture.direct, layers.1"):
        collect_factors(model, answer_logits, BATCHES, layers=layers)


def test_layers_that_would_count_twice_are_refused():
    model = toy_model()
    layers = find_expert_layers(model)
    for doubled, what in ((layers + layers, "name"), (layers + find_linear_layers(model, "head"), "index")):
        with pytest.raises(ValueError, match=f"have the same {what}"):
            collect_factors(model, answer_logits, BATCHES, layers=doubled)
    own = with_mixtures(OwnMixture)
    layers = find_expert_layers(own)
    with pytest.raises(ValueError, match="have the same second weight"):
        collect_factors(
            own, answer_logits, BATCHES, layers=layers + find_linear_layers(own, "*.land", first_index=len(layers))
        )


@pytest.mark.parametrize("how", ["one expert", "another order", "first and second"])
def test_partial_ties_are_refused(how):
    model = with_mixtures(OwnMixture)
    first, second = (layer.mixture.workers for layer in model.layers)
    if how == "one expert":
        second[2].land.weight = first[2].land.weight
    elif how == "another order":
        for expert in range(4):
            second[expert].land.weight = first[(expert + 1) % 4].land.weight
    else:
        model = with_mixtures(Square)
        worker = model.layers[0].mixture.workers[1]
        worker.land.weight = worker.rise.weight
    with pytest.raises(ValueError, match=r"is tied to another module"):
        find_expert_layers(model, down_proj="land")


class Square(OwnMixture):
    def __init__(self):
        super().__init__()
        self.workers = nn.ModuleList(Expert(6, 6) for _ in range(4))


def test_experts_with_gate_and_up_in_one_layer():
    class FusedGate(nn.Module):
        def __init__(self):
            super().__init__()
            self.both = nn.Linear(6, 10)
            self.out = nn.Linear(5, 6)

        def forward(self, x):
            gate, up = self.both(x).chunk(2, -1)
            return self.out(torch.sigmoid(gate) * up)

    class Mixture(OwnMixture):
        def __init__(self):
            super().__init__()
            self.workers = nn.ModuleList(FusedGate() for _ in range(4))

    model = with_mixtures(Mixture)
    layers = find_expert_layers(model)
    assert [(layer.down_proj, layer.d_in, layer.d_out) for layer in layers] == [("out", 5, 6)] * 2
    assert_exact(model, layers)


def test_layers_of_width_one():
    """A reward head, or the gate of a shared expert: torch's kernel for groups cannot take a single column."""
    model = with_mixtures(SharedMixture).float()
    layers = find_linear_layers(model, "*.shared_expert_gate")
    assert [layer.d_out for layer in layers] == [1, 1]
    factors = collect_factors(model, answer_logits, BATCHES, rank=3, layers=layers)
    exact = collect_factors(with_mixtures(SharedMixture), answer_logits, BATCHES, rank=3, layers=layers)
    for layer, other in zip(factors.layers, exact.layers, strict=True):
        torch.testing.assert_close(layer.g_trace, other.g_trace, rtol=1e-4, atol=0)
    LaplacePosterior(factors).predict(model, answer_logits, BATCHES[0])


@pytest.mark.parametrize("pattern", ["*.query", ["*.key", "*.value"], "head"])
def test_plain_linear_layers_by_name(pattern):
    model = toy_model()
    layers = find_linear_layers(model, pattern)
    assert [(x.num_experts, x.d_in, x.layout) for x in layers] == [(1, 6, "linear")] * len(layers)
    assert len(layers) == {"*.query": 2, "head": 1}.get(str(pattern), 4)
    factors = assert_exact(model, layers)
    assert all(float(layer.slots) > 0 for layer in factors.layers)


def test_experts_and_linear_layers_together():
    model = toy_model()
    experts = find_expert_layers(model)
    layers = experts + find_linear_layers(model, "*.value", first_index=len(experts))
    assert [layer.index for layer in layers] == [0, 1, 2, 3]
    assert_exact(model, layers)


def test_no_linear_layer_of_that_name():
    with pytest.raises(ValueError, match=r"no linear layer of ToyMoE matches '\*.nothing'; there are \d+, such as lay"):
        find_linear_layers(toy_model(), "*.nothing")


class SharedMixture(OwnMixture):
    def __init__(self):
        super().__init__()
        self.shared_expert = Specialist(toy_model().config)
        self.shared_expert_gate = nn.Linear(6, 1)

    def forward(self, x):
        return super().forward(x) + self.shared_expert_gate(x).sigmoid() * self.shared_expert(x)


def test_shared_experts_are_an_option():
    model = with_mixtures(SharedMixture)
    assert [layer.name for layer in find_expert_layers(model)] == [f"layers.{i}.mixture.workers" for i in range(2)]
    layers = find_expert_layers(model, shared_experts=True)
    assert [(layer.index, layer.name, layer.num_experts, layer.layout) for layer in layers] == [
        (0, "layers.0.mixture.workers", 4, "modules"),
        (1, "layers.0.mixture.shared_expert.fall", 1, "linear"),
        (2, "layers.1.mixture.workers", 4, "modules"),
        (3, "layers.1.mixture.shared_expert.fall", 1, "linear"),
    ]
    assert_exact(model, layers)


class SquareShared(nn.Module):
    def __init__(self, names):
        super().__init__()
        for name in names:
            setattr(self, name, nn.Linear(6, 6))

    def forward(self, x):
        for layer in self.children():
            x = torch.relu(layer(x))
        return x


def test_square_shared_experts_are_told_by_usual_names():
    class Mixture(SharedMixture):
        names = ("up_proj", "down_proj")

        def __init__(self):
            super().__init__()
            self.shared_expert = SquareShared(self.names)
            self.shared_adapter = nn.Sequential(nn.Linear(6, 2), nn.Linear(2, 6))  # is none

    class Odd(Mixture):
        names = ("one", "two")

    layers = find_expert_layers(with_mixtures(Mixture), shared_experts=True)
    assert [x.name for x in layers if x.layout == "linear"] == [
        f"layers.{i}.mixture.shared_expert.down_proj" for i in range(2)
    ]
    with pytest.raises(
        ValueError, match=r"\['one', 'two'\] of the shared expert .* do not tell which one comes second"
    ):
        find_expert_layers(with_mixtures(Odd), shared_experts=True)


def test_no_shared_experts_to_include():
    with pytest.raises(ValueError, match="ToyMoE has no shared experts beside its 2 expert layers"):
        find_expert_layers(toy_model(), shared_experts=True)


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


def test_the_example_of_the_readme():
    text = (Path(__file__).parents[3] / "README.md").read_text()
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
