import math

import pytest
import torch

from bmoe_lightning.methods import ShrunkTemperature
from bmoe_lightning.methods.base import scalar
from bmoe_lightning.methods.shrunk_temperature import fit_shrunk_temperature
from bmoe_lightning.methods.temperature_search import TEMPERATURE_RANGE, fit_temperature
from bmoe_lightning.utils.fit_warnings import FitWarning, collected_fit_warnings


def drawn(temperature, count, seed=0):
    """Ragged logits, and labels drawn from `softmax(logits / temperature)`."""
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(count, 4, generator=generator, dtype=torch.float64)
    logits[::3, 3] = -torch.inf
    return logits, torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator).squeeze(1)


@pytest.mark.parametrize("count", [1, 10, 200])
@pytest.mark.parametrize(("centre", "width"), [(0.4, 0.2), (1.4, 0.2), (0.3, 0.05), (0.4, 1.0)])
def test_agrees_with_a_dense_grid_of_the_inverse(count, centre, width):
    logits, labels = drawn(1.7, count)
    inverse = torch.linspace(0.02, 3, 4001, dtype=torch.float64)
    scaled = (inverse.view(-1, 1, 1) * logits.nan_to_num(neginf=-1e9)).log_softmax(-1)
    losses = -scaled[:, torch.arange(count), labels].sum(1)
    values = losses + (inverse - centre).square() / (2 * width**2)
    best = float(inverse[values.argmin()])
    found = 1 / fit_shrunk_temperature(logits, labels, centre=centre, width=width)
    assert found == pytest.approx(best, abs=1e-3)


def test_limits():
    logits, labels = drawn(1.5, 60)
    fitted = fit_temperature(logits, labels)
    assert fit_shrunk_temperature(logits[:0], labels[:0]) == 2.5
    assert fit_shrunk_temperature(logits, labels, centre=0.25, width=1e-5) == pytest.approx(4.0, rel=1e-6)
    assert fit_shrunk_temperature(logits, labels, centre=0.25, width=1e5) == pytest.approx(fitted, rel=1e-6)
    assert fitted < fit_shrunk_temperature(logits, labels, centre=0.25) < 4.0


def test_many_labels_win_over_the_prior():
    few, many = (fit_shrunk_temperature(*drawn(1.0, count)) for count in (3, 20_000))
    assert abs(many - 1.0) < 0.05
    assert few > 1.5


def test_a_few_labels_that_are_all_right_do_not_run_away():
    logits = drawn(1.0, 10)[0]
    found = fit_shrunk_temperature(logits, logits.argmax(-1))
    assert 1.0 < found < 2.5


def test_labels_that_speak_for_uniform_answers_are_believed():
    # Labels that have nothing to do with the logits: a prior on log T would hold T back for hundreds of labels.
    logits = drawn(1.0, 100)[0].clamp(min=-12)
    labels = torch.randint(4, (100,), generator=torch.Generator().manual_seed(1))
    plain = fit_temperature(logits, labels)
    assert plain > 10
    loss = torch.nn.functional.cross_entropy
    at_best = loss(logits / plain, labels)
    assert loss(logits / fit_shrunk_temperature(logits, labels), labels) - at_best < 0.005


def test_a_temperature_at_the_end_of_the_range_is_said():
    """All answers are wrong: nothing but uniform predictions is left, whatever the prior."""
    wrong = -torch.eye(4)[torch.arange(200) % 4]
    with pytest.warns(FitWarning, match=r"temperature 100 is at the end of the search range, although the prior"):
        assert fit_shrunk_temperature(2 * wrong, torch.arange(200) % 4) == pytest.approx(100)


def test_a_likelihood_that_does_not_depend_on_it_is_said():
    constant = torch.randn(50, 1).expand(50, 4)
    with pytest.warns(FitWarning, match=r"the 50 labels does not depend on the temperature .* the prior, 2\.5"):
        assert fit_shrunk_temperature(constant, torch.arange(50) % 4, width=1e9) == 2.5


@pytest.mark.parametrize("count", [1, 10, 200])
def test_a_temperature_that_labels_determine_is_not_warned_of(count, recwarn):
    with collected_fit_warnings() as warned:
        fit_shrunk_temperature(*drawn(1.7, count))
    assert not warned
    assert not recwarn


def test_a_centre_outside_the_searched_range_is_kept_without_labels_to_the_contrary():
    logits, labels = torch.zeros(5, 4), torch.zeros(5, dtype=torch.int64)  # uniform whatever T is
    for centre in (1e-4, 1e4):
        with pytest.warns(FitWarning, match="does not depend on the temperature"):
            found = fit_shrunk_temperature(logits, labels, centre=centre, width=centre / 10)
        assert found == pytest.approx(1 / centre, rel=1e-6)
    assert TEMPERATURE_RANGE[0] > 1e-4


@pytest.mark.parametrize("option", [{"width": 0.0}, {"width": math.nan}, {"centre": -0.4}, {"centre": math.inf}])
def test_refuses_bad_arguments(option):
    (name,) = option
    with pytest.raises(ValueError, match=f"{name} of the prior on 1/T must be positive and finite"):
        ShrunkTemperature(**option)
    with pytest.raises(ValueError, match=f"{name} of the prior"):
        fit_shrunk_temperature(*drawn(1.5, 10), **option)


def test_fits_other_labels_under_its_own_prior():
    logits, labels = drawn(1.5, 30)
    method = ShrunkTemperature(centre=0.5, width=0.1)
    found = method.refit({"temperature": scalar(9.0)}, logits, labels)
    assert float(found["temperature"]) == fit_shrunk_temperature(logits, labels, centre=0.5, width=0.1)
    assert float(method.refit({}, logits[:0], labels[:0])["temperature"]) == 2.0


def test_needs_labels_and_nothing_else():
    needs = ShrunkTemperature().needs
    assert needs.calibration_labels
    assert needs.calibration_inputs == 0
    assert not needs.prior_mean
    assert ShrunkTemperature().curvatures == ()
