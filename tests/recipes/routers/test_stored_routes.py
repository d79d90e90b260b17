"""What a study knows of its routers on disk, and the stability of routes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bmoe_lightning.methods import get_method
from bmoe_lightning.routers.noise_sweep import Stability
from bmoe_lightning.routers.types import Router
from recipes.routers.measures import StoredStability, read_stability
from recipes.routers.methods import read_known
from recipes.routers.stored_routes import ROUTES_FILE, Counted, Routes, count_costs, read_routes, write_routes

ROUTES = Routes(
    names=("noise", "mean_field"),
    layers=("layers.0", "layers.1"),
    susceptible=(1,),
    selections={"last": ("last layer", (1,))},
    active_macs=1000,
    counted={"noise": Counted(35, 16, 2)},
    num_questions=50,
)
INDICES = {"layers.0": 0.9, "layers.1": 0.5}
STABILITY = Stability({0.01: INDICES, 0.05: INDICES}, {0.01: INDICES}, {"layers.0": 1.0, "layers.1": 0.7}, INDICES)


def test_routes_survive_a_file(tmp_path):
    write_routes(tmp_path, ROUTES)
    assert read_routes(tmp_path) == ROUTES
    text = (tmp_path / ROUTES_FILE).read_text()
    (tmp_path / ROUTES_FILE).write_text(text.replace('"active_macs"', '"active"'))
    with pytest.raises(ValueError, match=ROUTES_FILE):
        read_routes(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no finished study of routers"):
        read_routes(tmp_path / "elsewhere")


def test_stability_is_that_of_one_fit_and_its_questions(tmp_path):
    stored, origin = StoredStability(tmp_path, 3, "noise"), {"fit": "one", "questions": 50}
    assert not stored.has(origin)
    stored.write(origin, STABILITY)
    assert stored.has(origin)
    assert not stored.has({**origin, "fit": "two"})
    assert not stored.has({**origin, "questions": 20})
    assert stored.read() == STABILITY
    assert read_stability(tmp_path, [3, 4], ["noise", "other"]) == {"noise": {3: STABILITY}}
    assert read_stability(tmp_path, [3], ["noise"], "calibration") == {}
    of_others = replace(STABILITY, floor=INDICES)
    StoredStability(tmp_path, 3, "noise", "calibration").write(origin, of_others)
    assert read_stability(tmp_path, [3], ["noise"], "calibration") == {"noise": {3: of_others}}
    assert stored.read() == STABILITY
    stored.path.write_text(stored.path.read_text()[:-40])
    with pytest.warns(UserWarning, match="The stability is measured again"):
        assert not stored.has(origin)


def test_costs_are_counted_by_the_methods(tmp_path):
    known = read_known()
    noise = replace(get_method(known.noise), num_samples=5)
    averaged = replace(noise, average="scores", name="averaged", label="Averaged")
    routers = [Router(f"layers.{index}.router", index, 8, 64, f"layers.{index}.experts") for index in (0, 1)]
    found = count_costs([noise, averaged, get_method(known.reference)], routers)
    assert found[noise.name].passes == 5
    assert found[noise.name].macs == 2 * 8
    assert found["averaged"] == Counted(1, 2 * 5 * 8, 2)
    assert known.reference not in found
    some = count_costs([replace(noise, layers=(1,)), replace(averaged, layers=("layers.0.router",))], routers)
    assert (some[noise.name], some["averaged"]) == (Counted(5, 8, 1), Counted(1, 5 * 8, 1))
    held = replace(noise, layers=("model.layers.1.router",))  # of a module that holds the model
    assert count_costs([held], routers)[noise.name] == Counted(5, 8, 1)
