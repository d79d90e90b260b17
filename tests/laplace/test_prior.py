"""Prior precisions from the evidence: maxima, refusals and doubts."""

import math
import warnings

import pytest
import torch

from bmoe_lightning.laplace.prior import (
    fit_evidence,
    log_evidence_penalty,
)
from bmoe_lightning.utils.fit_warnings import FitWarning


def spectra():
    """Two layers of three experts; the last expert of each is idle."""
    curvature = [torch.rand(3, 4, 5, dtype=torch.float64).exp() * 20, torch.rand(3, 2, 2, dtype=torch.float64)]
    for layer in curvature:
        layer[2] = 0
    return curvature, [torch.tensor([0.3, 0.4, 0.0]).double(), torch.tensor([0.1, 0.05, 0.01]).double()]


def penalty_at(curvature, distances, *log_precisions):
    values = torch.tensor(log_precisions, dtype=torch.float64).exp()
    return float(log_evidence_penalty(curvature, distances, values))


def test_penalty_by_hand():
    curvature = [torch.tensor([[[3.0]], [[0.0]]], dtype=torch.float64)]
    distances = [torch.tensor([2.0, 1.0])]
    found = log_evidence_penalty(curvature, distances, torch.tensor([0.5], dtype=torch.float64))
    assert float(found) == pytest.approx(-0.5 * (0.5 * 3 + math.log(1 + 3 / 0.5)))


def test_global_precision_is_the_maximum():
    curvature, distances = spectra()
    (first, second) = fit_evidence(curvature, distances, "global").log().tolist()
    assert first == second
    best = penalty_at(curvature, distances, first, first)
    scan = [penalty_at(curvature, distances, x, x) for x in torch.linspace(-10, 15, 2001).tolist()]
    assert best >= max(scan)
    assert best == pytest.approx(max(scan), abs=1e-3)
    assert scan[0] < best - 1 > scan[-1]  # an inner maximum, not an edge


def test_precisions_of_layers_are_the_maximum():
    curvature, distances = spectra()
    found = fit_evidence(curvature, distances, "layer").log().tolist()
    assert abs(found[0] - found[1]) > 0.1
    best = penalty_at(curvature, distances, *found)
    assert best > penalty_at(curvature, distances, *fit_evidence(curvature, distances, "global").log().tolist())
    for step in (-0.5, -0.01, 0.01, 0.5):
        assert penalty_at(curvature, distances, found[0] + step, found[1]) < best
        assert penalty_at(curvature, distances, found[0], found[1] + step) < best


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_derivative_is_zero(scope):
    curvature, distances = spectra()
    log_precision = fit_evidence(curvature, distances, scope).log().requires_grad_()
    log_evidence_penalty(curvature, distances, log_precision.exp()).backward()
    slope = log_precision.grad.sum() if scope == "global" else log_precision.grad.abs().max()
    assert abs(float(slope)) < 1e-9


def test_stationary_point_is_where_the_effective_number_of_weights_says():
    curvature, distances = spectra()
    for s, d, precision in zip(curvature, distances, fit_evidence(curvature, distances, "layer"), strict=True):
        assert float((s / (s + precision)).sum()) == pytest.approx(float(precision * d.sum()), rel=1e-9)


def test_evidence_refusals():
    curvature, distances = spectra()
    still = [torch.zeros(3), torch.zeros(3)]
    with pytest.raises(ValueError, match="equal the prior mean"):
        fit_evidence(curvature, still)
    with pytest.raises(ValueError, match="equal the prior mean"):
        fit_evidence(curvature, [distances[0], still[1]], "layer")
    with pytest.raises(ValueError, match="curvature is zero everywhere"):
        fit_evidence([torch.zeros_like(s) for s in curvature], distances)
    with pytest.raises(ValueError, match="unknown scope 'expert'; valid are global, layer"):
        fit_evidence(curvature, distances, "expert")


def test_evidence_at_an_end_of_its_range_is_said():
    curvature, distances = spectra()
    with pytest.warns(FitWarning, match=r"end of its search range \(1e\+12 in layer 1\).*nearly equal the prior mean"):
        fit_evidence(curvature, [distances[0], torch.full((3,), 1e-30)])
    names = ("model.layers.1.mlp", "model.layers.3.mlp")
    with pytest.warns(FitWarning, match=r"\(1e\+12 in layer model\.layers\.3\.mlp\)"):
        fit_evidence(curvature, [distances[0], torch.full((3,), 1e-30)], names=names)
    with pytest.warns(FitWarning, match=r"end of its search range \(1e\+12\)"):
        fit_evidence(curvature, [torch.full((3,), 1e-30)] * 2, "global", names=names)
    with pytest.warns(FitWarning, match=r"end of its search range \(1e\+12\)"):
        fit_evidence(curvature, [torch.full((3,), 1e-30)] * 2, "global")
    with pytest.warns(FitWarning, match="end of its search range"):
        fit_evidence([1e-30 * s for s in curvature], [1e9 * d for d in distances])


def test_an_evidence_that_does_not_depend_on_the_precision_is_said():
    curvature, distances = spectra()
    with pytest.warns(FitWarning, match=r"fewer than 0.5 directions.* \(gamma \d.*e-\d\d in layer 0\); use more"):
        fit_evidence([1e-12 * curvature[0], curvature[1]], distances)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit_evidence(curvature, distances)
        fit_evidence(curvature, distances, "global")


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_a_curvature_that_is_not_finite_is_refused(value):
    curvature, distances = spectra()
    curvature[1][0, 0, 0] = value
    with pytest.raises(ValueError, match="negative values, NaN or infinity"):
        fit_evidence(curvature, distances)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_distances_that_are_not_finite_are_refused_by_name(value):
    curvature, distances = spectra()
    with pytest.raises(ValueError, match="distance of the expert weights from the prior mean is not finite"):
        fit_evidence(curvature, [distances[0], torch.full((3,), value)])
