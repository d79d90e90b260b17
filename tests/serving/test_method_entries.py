"""Methods as JSON values: every option of every registered method is read as it was written."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import get_args, get_type_hints

import pytest

from bmoe_lightning.curvature import Curvature
from bmoe_lightning.curvature.spec import ExpertLayers, LinearLayers, LoRALayers
from bmoe_lightning.methods import get_method, method_names
from bmoe_lightning.serving import UnknownMethodError, method_entry, method_of_entry
from bmoe_lightning.serving.method_entries import methods_of_entries

CURVATURES = (
    Curvature(),
    Curvature(rank=3, fisher="mc", layers=ExpertLayers(shared_experts=True, projections=("down_proj", "gate_up_proj"))),
    Curvature(rank=0, layers=LinearLayers("*.lora_[AB].default", allow_tied=True), skip_layers=(1, 2)),
    Curvature(layers=LoRALayers("A"), offload=True, cache_bytes=12345, max_batches=3, factor_dtype="bfloat16"),
)


def of(entry):
    return method_of_entry(json.loads(json.dumps(entry)))


@pytest.mark.parametrize("name", method_names())
def test_a_method_with_its_own_layers_is_read_as_it_was_written(name):
    completed = get_method(name).with_defaults(Curvature(rank=3))
    assert of(method_entry(completed)) == completed


def others(method):
    """The method with each of its options changed, one at a time, where another value is valid."""
    hints = get_type_hints(type(method))
    for entry in fields(method):
        value = getattr(method, entry.name)
        values = ("other_name", 2, 3, 0.5, 7.5, not value, None, ("a", "b"), ("a.safetensors",), (1, 2), (0.5, 2.0))
        guesses = CURVATURES if entry.name == "curvature" else (*get_args(hints[entry.name]), *CURVATURES, *values)
        for guess in guesses:
            if type(guess) is type(value) or (value is None and not isinstance(guess, type)):
                try:
                    changed = replace(method, **{entry.name: guess})
                    changed.fit_options(), changed.curvatures
                except (AttributeError, TypeError, ValueError):
                    continue
                if changed != method:
                    yield changed


@pytest.mark.parametrize("name", method_names())
def test_every_option_is_read_as_it_was_written(name):
    method, count = get_method(name), 0
    for found in (method, *others(method)):
        again = of(method_entry(found))
        assert again == found
        assert type(again) is type(found)
        assert again.fit_options() == found.fit_options()
        assert again.options() == found.options()
        assert again.curvatures == found.curvatures
        assert hash(again) == hash(found)
        count += 1
    assert count > 2  # name and label at least


@pytest.mark.parametrize("curvature", CURVATURES)
def test_curvatures_are_whole(curvature):
    method = replace(get_method("laplace_lpo"), curvature=curvature)
    assert of(method_entry(method)).curvature == curvature


def test_missing_options_have_their_default():
    method = get_method("swag")
    entry = method_entry(method)
    assert of({key: entry[key] for key in ("class", "name")}) == method


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class": "os:system"}, "'os:system' of the method 'laplace_lpo' is not registered"),
        ({"class": None}, "the class None"),
        ({"class": ["a"]}, "is not registered"),
        ({"options": 3}, "unexpected keyword"),
        ({"curvature": "other"}, "cannot be made of its description"),
        ({"link": "other"}, "link"),
        ({"curvature": {"rank": 3, "layers": {"selection": "os:system"}}}, "unknown selection of layers 'os:system'"),
        ({"curvature": {"rank": 3, "layers": {"selection": ["a"]}}}, "unknown selection"),
        ({"curvature": {"rank": "3", "layers": {"selection": "bmoe_lightning.curvature.spec:ExpertLayers"}}}, "rank"),
        ({"curvature": {"rank": 3, "other": 1, "layers": {"selection": "bmoe_lightning.curvature.spec:LoRALayers"}}},
         "other"),
        ({"curvature": {"rank": 3, "layers": {"selection": "bmoe_lightning.curvature.spec:LinearLayers"}}}, "names"),
    ],
)  # fmt: skip
def test_foreign_descriptions_are_refused(change, message):
    entry = {**method_entry(get_method("laplace_lpo")), **change}
    with pytest.raises(UnknownMethodError, match=message):
        of(entry)


def test_only_wanted_methods_are_made():
    entries = [method_entry(get_method("map")), {"class": "theirs:Method", "name": "theirs"}]
    assert methods_of_entries(entries, ["map"]) == [get_method("map")]
    assert methods_of_entries(entries, [get_method("swag")]) == []
    with pytest.raises(UnknownMethodError, match="pass the method in methods="):
        methods_of_entries(entries)
