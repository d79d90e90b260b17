"""The methods of the study: found by what they do, with a variant for each option that they have."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import pytest

from bmoe_lightning.methods import Method, Needs, get_method, method_names, option
from recipes.common.cli import UsageError
from recipes.qwen_obqa.methods import build_methods
from recipes.qwen_obqa.settings import Settings
from recipes.routers import methods
from recipes.routers.methods import (
    base_of,
    entries,
    few_samples,
    layer_entries,
    random_router_names,
    read_known,
    selections,
    with_variants,
)

KNOWN = read_known()


@dataclass(frozen=True)
class Routed(Method):
    """A method with an option for every variant."""

    name: str = "routed"
    label: str = "Routed"
    average: Literal["predictions", "scores"] = option("predictions", "What is averaged.")
    layers: tuple[int, ...] = option((), "Layers.")
    num_samples: int = option(3, "Samples.")

    @property
    def needs(self):
        return Needs(routers=True, training_labels=True, router_training=True)

    def log_probs(self, batch, state):
        return batch.logits.log_softmax(-1)


@pytest.fixture
def routed(monkeypatch):
    known = get_method
    monkeypatch.setattr(methods, "get_method", lambda name: Routed() if name == "routed" else known(name))
    monkeypatch.setattr(methods, "method_names", lambda: (*method_names(), "routed"))


def test_methods_with_random_routers_are_found_by_what_they_need(routed):
    found = random_router_names(["all"], KNOWN)
    assert found[0] == KNOWN.noise
    assert found[-1] == "routed"
    assert all(methods.get_method(name).needs.routers for name in found)
    assert random_router_names(["routed"], KNOWN) == [KNOWN.noise, "routed"]
    assert KNOWN.trained_routers not in found
    assert entries([], KNOWN, 35)[-1] == KNOWN.trained_routers


def test_others_are_refused(routed):
    with pytest.raises(UsageError, match=r"temperature replaces no router logits, .* give one of router_noise"):
        random_router_names(["temperature"], KNOWN)
    with pytest.raises(UsageError, match=r"--methods: .*nothing"):
        random_router_names(["nothing"], KNOWN)


def test_every_option_has_a_variant(routed):
    found = [entry["init_args"] for entry in entries(["routed"], KNOWN, 35)[-3:]]
    assert found == [
        {"num_samples": 35},
        {"average": "scores", "name": "routed_scores", "label": "Routed (scores)", "num_samples": 35},
        {"num_samples": 0, "name": "routed_mean", "label": "Routed (mean)"},
    ]
    chosen = selections(4, [0, 2])
    of_layers = [entry["init_args"] for entry in layer_entries(["laplace_lpo", "routed"], chosen, None)]
    assert [found["layers"] for found in of_layers] == [[0, 2], [3], [2, 3]]
    assert {base_of(found["name"], ["routed", KNOWN.noise]) for found in of_layers} == {"routed"}
    assert layer_entries(["laplace_lpo"], chosen, None) == []
    both = [
        entry["init_args"]["name"] for entry in layer_entries([KNOWN.noise, "routed", "swag_router"], chosen[:1], 8)
    ]
    assert both == [f"{KNOWN.noise}_susceptible", "routed_susceptible"]  # noise is the control
    untrained = [entry["init_args"]["name"] for entry in layer_entries(["mc_dropout_router", "routed"], chosen[:1], 8)]
    assert untrained == ["mc_dropout_router_susceptible", "routed_susceptible"]


def test_what_is_set_for_a_method_is_set_for_its_variants(routed):
    names = ["routed", KNOWN.noise]
    found = [*entries(names, KNOWN, 35), *layer_entries(["routed"], selections(4, [0, 2]), 35)]
    given = ("routed.num_samples=4", "routed.curvature.rank=2", "routed_mean.curvature.rank=3", "map.label=x")
    variants = ("routed_scores", "routed_mean", "routed_susceptible", "routed_last", "routed_last_third")
    added = [f"{name}.curvature.rank=2" for name in variants]
    assert with_variants(given, found, names) == (*added, *given)  # of two, the last wins
    assert with_variants((), found, names) == ()
    with pytest.raises(UsageError, match="METHOD"):
        with_variants(("routed",), found, names)


def test_routers_that_nothing_trains_have_no_row_of_their_mean():
    dropout = get_method("mc_dropout_router")
    assert not any("mean" in str(options) for options in methods._variants(dropout))
    assert any("mean" in str(options) for options in methods._variants(replace(dropout, epochs=2)))


def test_samples_are_limited_where_each_takes_a_pass():
    noise = get_method(KNOWN.noise)
    assert few_samples(replace(noise, num_samples=35), 8).num_samples == 8
    assert few_samples(replace(noise, num_samples=5), 8).num_samples == 5
    averaged = replace(noise, average="scores", num_samples=35, name="averaged", label="Averaged")
    assert few_samples(averaged, 8) is averaged
    assert few_samples(get_method(KNOWN.reference), 8) == get_method(KNOWN.reference)


def test_without_an_option_there_is_no_variant():
    @dataclass(frozen=True)
    class Plain(Routed):
        average = layers = num_samples = None

    assert methods._has(Plain(), "label")
    named = [entry for entry in entries([], KNOWN, 35) if isinstance(entry, str)]
    assert named == [*KNOWN.plain, KNOWN.trained_routers]


def test_layers_that_are_the_same_are_compared_once():
    assert [selection.name for selection in selections(6, [0, 5])] == ["susceptible", "last", "last_third"]
    assert [selection.name for selection in selections(3, [2])] == ["susceptible"]
    assert [selection.indices for selection in selections(4, [2, 3])] == [(2, 3), (3,)]
    assert selections(1, [0]) == []


def test_the_method_of_a_row_is_the_longest_that_fits():
    assert base_of("noise_of_two_scores", ["noise", "noise_of_two"]) == "noise_of_two"
    assert base_of("noise", ["noise"]) == "noise"
    assert base_of("noisy", ["noise"]) is None


def test_all_of_them_can_be_built():
    names = random_router_names(["all"], KNOWN)
    settings = Settings(methods=tuple(entries(names, KNOWN, 4)), output_dir="nowhere").resolved()
    built = {method.name: method for method in build_methods(settings)}
    assert set(built) >= {*KNOWN.plain, *names, "trained_gates"} | {KNOWN.trained_name} - {None}
    assert built[KNOWN.noise].num_samples == 4
