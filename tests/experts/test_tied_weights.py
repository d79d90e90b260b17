"""Tied weights: layers that share all weights are one, anything else is refused."""

import pytest
from oracles.models import answer_logits, toy_model
from oracles.own_models import (
    BATCHES,
    OwnMixture,
    Square,
    assert_exact,
    with_mixtures,
)

from bmoe_lightning.curvature import collect_factors
from bmoe_lightning.experts import (
    down_proj_parameters,
    expert_parameters,
    find_expert_layers,
    find_linear_layers,
)


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
    (layer,) = find_linear_layers(model, "head", allow_tied=True)
    assert (layer.name, layer.num_experts) == ("head", 1)


def test_layers_that_would_count_twice_are_refused():
    model = toy_model()
    layers = find_expert_layers(model)
    for doubled, what in ((layers + layers, "name"), (layers + find_linear_layers(model, "head"), "index")):
        with pytest.raises(ValueError, match=f"have the same {what}"):
            collect_factors(model, answer_logits, BATCHES, layers=doubled)
    own = with_mixtures(OwnMixture)
    layers = find_expert_layers(own)
    with pytest.raises(ValueError, match="have the same down_proj weight"):
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
