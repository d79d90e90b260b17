import math
import warnings

import pytest
import torch
from methods_cases import drawn

from bmoe_lightning.methods.temperature_search import TEMPERATURE_RANGE, check_temperature, fit_temperature
from bmoe_lightning.utils.fit_warnings import FitWarning


def loss(logits, labels, temperature):
    return float(torch.nn.functional.cross_entropy(logits / temperature, labels, reduction="sum"))


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0, 20.0])
@pytest.mark.parametrize("count", [30, 400])
def test_agrees_with_a_brute_force_grid(temperature, count):
    logits, labels = drawn(temperature, count, scale=4 * temperature)
    grid = torch.logspace(math.log10(temperature / 10), math.log10(temperature * 10), 4001).tolist()
    best = min(grid, key=lambda t: loss(logits, labels, t))
    found = fit_temperature(logits, labels)
    assert found == pytest.approx(best, rel=2e-3)
    assert loss(logits, labels, found) <= loss(logits, labels, best) + 1e-9


def test_is_stationary_to_high_accuracy():
    logits, labels = drawn(2.0)
    inverse = torch.tensor(1 / fit_temperature(logits, labels), dtype=torch.float64, requires_grad=True)
    absent = logits == -torch.inf
    scaled = (logits.masked_fill(absent, 0) * inverse).masked_fill(absent, -torch.inf)
    torch.nn.functional.cross_entropy(scaled, labels).backward()
    assert abs(float(inverse.grad)) < 1e-6


def test_finds_the_temperature_that_labels_were_drawn_at():
    assert fit_temperature(*drawn(2.5, 20_000)) == pytest.approx(2.5, rel=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_takes_any_dtype_and_any_shift(dtype):
    logits, labels = drawn(2.0)
    rounded = logits.to(dtype)
    shifts = torch.randn(len(logits), 1, dtype=torch.float64) * 100
    assert fit_temperature(rounded, labels) == pytest.approx(
        fit_temperature(rounded.double() + shifts, labels), rel=1e-6
    )
    assert fit_temperature(logits.log_softmax(-1), labels) == pytest.approx(fit_temperature(logits, labels), rel=1e-6)


def test_labels_that_do_not_bound_it_give_an_end_of_the_range_and_a_warning():
    logits = drawn(1.0)[0]
    with pytest.warns(UserWarning, match="end of the search range"):
        assert fit_temperature(logits, logits.argmax(-1)) == pytest.approx(TEMPERATURE_RANGE[0])
    worst = logits.masked_fill(logits == -torch.inf, torch.inf).argmin(-1)
    with pytest.warns(UserWarning, match="end of the search range"):
        assert fit_temperature(logits, worst) == pytest.approx(TEMPERATURE_RANGE[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit_temperature(*drawn(1.0))


def test_huge_logits_do_not_overflow():
    logits, labels = drawn(30.0, scale=3000.0, count=2000)
    assert math.isfinite(fit_temperature(logits, labels))


def test_refuses_bad_calibration_data():
    logits, labels = drawn(1.0, 6)
    with pytest.raises(ValueError, match="calibration split is empty"):
        fit_temperature(logits[:0], labels[:0])
    with pytest.raises(ValueError, match=r"logits \(6, 4\) and labels \(5,\)"):
        fit_temperature(logits, labels[:5])
    with pytest.raises(ValueError, match="NaN"):
        fit_temperature(logits.index_fill(1, torch.tensor([1]), torch.nan), labels)
    with pytest.raises(ValueError, match="for K = 4 classes"):
        fit_temperature(logits, labels + 4)
    absent = labels.clone()
    absent[3] = 3
    with pytest.raises(ValueError, match="example 3"):
        fit_temperature(logits, absent)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_refuses_what_is_no_temperature(temperature):
    with pytest.raises(ValueError, match="positive and finite"):
        check_temperature(temperature)


def test_a_temperature_next_to_an_end_is_said():
    """The last grid step of a likelihood that goes on rising, if ever less."""
    logits = torch.tensor([[600.0, 0.0]]).repeat(20, 1)
    with pytest.warns(FitWarning, match="end of the search range"):
        fit_temperature(logits, torch.zeros(20, dtype=torch.int64))


def test_logits_that_do_not_depend_on_it_leave_it_at_one():
    logits = torch.full((50, 4), 3.0)
    logits[::2, 3] = -torch.inf
    with pytest.warns(FitWarning, match="likelihood of the 50 labels does not depend on the temperature"):
        assert fit_temperature(logits, torch.zeros(50, dtype=torch.int64)) == 1.0


@pytest.mark.parametrize("labels", [torch.tensor([0.4, 1.4]), torch.tensor([True, False])])
def test_labels_that_are_no_integers_are_refused(labels):
    with pytest.raises(ValueError, match="class indices as integers"):
        fit_temperature(torch.zeros(2, 3), labels)
