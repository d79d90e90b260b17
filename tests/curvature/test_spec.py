"""Equal specifications are one pass, one file and one posterior; different ones are not."""

from dataclasses import asdict, dataclass, make_dataclass, replace

import pytest
import torch
from oracles.models import toy_model

from bmoe_lightning.curvature import Curvature, ExpertLayers, LinearLayers
from bmoe_lightning.curvature.spec import LayerSelection
from bmoe_lightning.experts import find_linear_layers


@dataclass(frozen=True)
class Named(LayerSelection):
    """A selection of a user's own, with options that JSON gives back as something else."""

    names: tuple[str, ...] = ("head",)

    def find(self, model):
        return [layer for name in self.names for layer in find_linear_layers(model, name)]


def test_equal_specifications_have_one_digest():
    assert Curvature(rank=3).digest == Curvature(rank=3, layers=ExpertLayers()).digest
    assert Curvature(skip_layers=[1]) == Curvature(skip_layers=(1,))
    assert Curvature(skip_layers=[1]).digest == Curvature(skip_layers=(1,)).digest


@pytest.mark.parametrize(
    "changes",
    [
        {"rank": 4},
        {"fisher": "mc"},
        {"approximation": "reduce"},
        {"sketch": "exact"},
        {"layers": LinearLayers("head")},
        {"layers": ExpertLayers(shared_experts=True)},
        {"skip_layers": (1,)},
        {"max_batches": 2},
        {"factor_dtype": "bfloat16"},
    ],
)
def test_another_option_is_another_digest(changes):
    assert replace(Curvature(rank=3), **changes).digest != Curvature(rank=3).digest


@pytest.mark.parametrize("changes", [{"offload": True}, {"cache_bytes": 1 << 20}])
def test_where_and_how_much_is_stored_asks_for_no_other_pass(changes):
    changed = replace(Curvature(rank=3), **changes)
    assert changed.digest == Curvature(rank=3).digest
    assert changed.without_pass().cache_bytes == changed.cache_bytes


def test_descriptions_are_what_json_gives_back():
    description = Curvature(layers=Named(("a", "b")), skip_layers=(1,)).description()
    assert description["layers"] == {"selection": f"{__name__}:Named", "names": ["a", "b"]}
    assert description["skip_layers"] == [1]


def test_an_option_that_json_cannot_hold_is_refused():
    typed = make_dataclass("Typed", [("dtype", torch.dtype, torch.float32)], bases=(Named,), frozen=True)
    with pytest.raises(TypeError, match="JSON"):
        Curvature(layers=typed()).description()


def test_two_classes_of_one_name_are_two_selections():
    others = type("Named", (Named,), {"__module__": "elsewhere"})
    assert asdict(others()) == asdict(Named())
    assert Curvature(layers=others()).digest != Curvature(layers=Named()).digest


def test_rank_zero_collects_nothing_over_the_same_layers():
    prior = Curvature(rank=3, layers=Named(), skip_layers=(1,)).without_pass()
    assert not prior.collects
    assert (prior.layers, prior.skip_layers) == (Named(), (1,))


def test_indices_of_no_layer_are_refused_with_the_names_of_the_layers():
    with pytest.raises(
        ValueError, match=r"skip_layers has \[7\], and no layer has such an index; use .* \(0 is \S+, 1 is"
    ):
        Curvature(skip_layers=(0, 7)).find_layers(toy_model())


def test_find_layers_is_the_selection_s():
    assert [layer.name for layer in Curvature(layers=Named()).find_layers(toy_model())] == ["head"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": -1}, "rank must be at least 0"),
        ({"fisher": "exakt"}, "unknown fisher"),
        ({"max_batches": 0}, "max_batches"),
        ({"cache_bytes": 0}, "cache_bytes must be at least 1"),
    ],
)
def test_values_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        Curvature(**options)
