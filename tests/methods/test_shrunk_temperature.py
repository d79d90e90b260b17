import math

import pytest
import torch
from methods_cases import RANK3

from bmoe_lightning.methods import ShrunkTemperature
from bmoe_lightning.methods.base import scalar
from bmoe_lightning.methods.shrunk_temperature import fit_shrunk_temperature
from bmoe_lightning.methods.temperature_search import fit_temperature


def drawn(temperature, count, seed=0):
    """Ragged logits, and labels drawn from `softmax(logits / temperature)`."""
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(count, 4, generator=generator, dtype=torch.float64)
    logits[::3, 3] = -torch.inf
    return logits, torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator).squeeze(1)


@pytest.mark.parametrize("count", [1, 10, 200])
@pytest.mark.parametrize("evidence", [0.7, 3.0])
def test_agrees_with_a_brute_force_grid(count, evidence):
    logits, labels = drawn(1.7, count)

    def objective(temperature):
        loss = torch.nn.functional.cross_entropy(logits / temperature, labels, reduction="sum")
        return float(loss) + math.log(temperature / evidence) ** 2 / (2 * 0.2**2)

    best = min(torch.logspace(-1, 1, 4001).tolist(), key=objective)
    found = fit_shrunk_temperature(logits, labels, evidence)
    assert found == pytest.approx(best, rel=2e-3)
    assert objective(found) <= objective(best) + 1e-9


def test_limits():
    logits, labels = drawn(1.5, 60)
    fitted = fit_temperature(logits, labels)
    assert fit_shrunk_temperature(logits[:0], labels[:0], 2.4) == 2.4
    assert fit_shrunk_temperature(logits, labels, 2.4, prior_std=1e-5) == pytest.approx(2.4, rel=1e-6)
    assert fit_shrunk_temperature(logits, labels, 2.4, prior_std=1e5) == pytest.approx(fitted, rel=1e-6)
    assert fitted < fit_shrunk_temperature(logits, labels, 2.4) < 2.4


def test_many_labels_win_over_the_prior():
    few, many = (fit_shrunk_temperature(*drawn(1.5, count), 4.0) for count in (10, 20_000))
    assert abs(many - 1.5) < 0.1
    assert few > 2


def test_a_few_labels_that_are_all_right_do_not_run_away():
    logits = drawn(1.0, 10)[0]
    found = fit_shrunk_temperature(logits, logits.argmax(-1), 2.0)
    assert 1.0 < found < 2.0


def test_an_evidence_temperature_outside_the_searched_range_is_kept_without_labels_to_the_contrary():
    logits, labels = torch.zeros(5, 4), torch.zeros(5, dtype=torch.int64)  # uniform whatever T is
    for evidence in (1e-4, 1e4):
        assert fit_shrunk_temperature(logits, labels, evidence) == pytest.approx(evidence, rel=1e-6)


def test_refuses_bad_arguments():
    logits, labels = drawn(1.5, 10)
    with pytest.raises(ValueError, match="temperature must be positive"):
        fit_shrunk_temperature(logits, labels, 0.0)
    with pytest.raises(ValueError, match="prior_std"):
        fit_shrunk_temperature(logits, labels, 1.0, prior_std=0.0)


def test_fits_other_labels_around_the_evidence_temperature():
    logits, labels = drawn(1.5, 30)
    state = {"temperature": scalar(9.0), "evidence_temperature": scalar(2.0)}
    found = ShrunkTemperature(curvature=RANK3).refit(state, logits, labels)
    assert float(found["temperature"]) == fit_shrunk_temperature(logits, labels, 2.0)
    assert float(found["evidence_temperature"]) == 2.0
    assert float(ShrunkTemperature().refit(state, logits[:0], labels[:0])["temperature"]) == 2.0
