"""The shape of every method: options, defaults of the run, and what a fit is compared with."""

from __future__ import annotations

import pytest
import torch
from methods_cases import RANK3

from bmoe_lightning.curvature import Curvature, LinearLayers
from bmoe_lightning.methods import MAP, DeepEnsemble, LaplaceLPO, MCDropout, get_method, method_names
from bmoe_lightning.methods.base import check_method_names, state_numbers


@pytest.mark.parametrize("name", method_names())
class TestEveryMethod:
    def test_names_its_source_in_full(self, name):
        method = get_method(name)
        assert name == "map" or method.source.startswith("https://"), "a URL of the paper or the documentation"
        assert method.cost


class TestDefaults:
    def test_the_run_fills_in_the_curvature_that_a_method_leaves_open(self):
        assert LaplaceLPO().with_defaults(RANK3).spec is RANK3
        chosen = LaplaceLPO(curvature=Curvature(rank=7))
        assert chosen.with_defaults(RANK3) is chosen
        assert MAP().with_defaults(RANK3) == MAP()
        assert LaplaceLPO().curvatures == ()
        assert LaplaceLPO(curvature=RANK3).curvatures == (RANK3,)

    def test_what_decides_about_a_fit(self):
        method = LaplaceLPO(curvature=RANK3)
        assert LaplaceLPO(name="x", label="y", curvature=RANK3, link="probit").fit_options() == method.fit_options()
        for other in (LaplaceLPO(curvature=Curvature(rank=4)), LaplaceLPO(curvature=RANK3, scope="global")):
            assert other.fit_options() != method.fit_options()
        elsewhere = LaplaceLPO(curvature=Curvature(rank=3, layers=LinearLayers("*.o_proj")))
        assert elsewhere.fit_options() != method.fit_options()

    def test_paths_of_a_config_file_become_a_tuple(self):
        assert DeepEnsemble(runs=["a", "b"]).runs == ("a", "b")
        hash(DeepEnsemble(runs=["a", "b"]))

    def test_only_methods_with_a_fit_are_fitted(self):
        assert not MAP().is_fitted_method
        assert not MCDropout().is_fitted_method
        assert LaplaceLPO().is_fitted_method
        assert DeepEnsemble().is_ensemble
        assert not MAP().is_ensemble


def test_names_are_distinct():
    check_method_names([MAP(), MAP(name="again")])
    with pytest.raises(ValueError, match="map occurs more than once; give one of them another name="):
        check_method_names([MAP(), MAP()])
    with pytest.raises(ValueError, match="no method"):
        check_method_names([])


@pytest.mark.parametrize("name", ["a/b", "", "a b", "../x", "Upper", ".x"])
def test_names_can_be_part_of_keys_and_files(name):
    with pytest.raises(ValueError, match="lower-case letters, digits"):
        check_method_names([MAP(name=name)])


def test_numbers_of_a_state():
    state = {
        "one": torch.tensor(2.0),
        "same": torch.tensor([3.0, 3.0]),
        "layers": torch.tensor([1.0, 2.0]),
        "matrix": torch.zeros(2, 2),
        "empty": torch.zeros(0),
        "long": torch.zeros(10_000),
    }
    assert state_numbers(state) == {"one": 2.0, "same": 3.0, "layers_0": 1.0, "layers_1": 2.0}


PREDICTION_ONLY = {"link", "num_samples", "runs", "fits"}
# Its temperature is fitted to the predictions that link and samples give.
FITTED_TO_PREDICTIONS = {"laplace_temperature", "mc_dropout"}


@pytest.mark.parametrize("name", method_names())
def test_a_fit_is_compared_with_all_that_decides_about_it(name):
    method = get_method(name).with_defaults(RANK3)
    exempt = set() if name in FITTED_TO_PREDICTIONS else PREDICTION_ONLY
    if method.needs.routers:  # where samples are of routes, which their scale is fitted to
        exempt = exempt - {"num_samples", "link", "link_samples"} | {"samples_per_pass"}
    exempt = exempt | ({"size"} if method.needs.run_methods else set())  # the other posteriors have fits of their own
    assert set(method.fit_options()) == {"class", *method.options()} - {"label"} - exempt


def test_classes_of_one_name_are_two_methods():
    other = type("MAP", (MAP,), {"__module__": "elsewhere"})
    assert other().options() == MAP().options()
    assert other().fit_options() != MAP().fit_options()


def test_a_curvature_of_another_type_is_refused():
    with pytest.raises(TypeError, match="laplace_lpo must be a Curvature"):
        check_method_names([LaplaceLPO(curvature="rank 3")])
