import torch
from methods_cases import RANK3, fitted, predictions
from oracles.models import answer_logits

from bmoe_lightning.curvature import collect_factors
from bmoe_lightning.laplace import LaplacePosterior
from bmoe_lightning.methods import LaplaceEvidence, LaplaceTemperature
from bmoe_lightning.methods.base import scalar

PRECISION = torch.tensor([2.0, 2.0], dtype=torch.float64)


def test_a_temperature_goes_on_top_of_the_probabilities(model, batches):
    posterior = LaplacePosterior(collect_factors(model, answer_logits, batches, rank=3))
    plain = LaplaceEvidence(curvature=RANK3, num_samples=200)
    scaled = LaplaceTemperature(curvature=RANK3, num_samples=200)
    one = LaplaceTemperature(name="one", curvature=RANK3, num_samples=200)
    fit = fitted(
        (plain, {"prior_precision": PRECISION}),
        (scaled, {"prior_precision": PRECISION, "temperature": scalar(1.6)}),
        (one, {"prior_precision": PRECISION, "temperature": scalar(1.0)}),
        posterior=posterior,
    )
    found = predictions(model, batches, plain, scaled, one, fit=fit)
    powered = found["laplace_evidence"].log_probs.exp() ** (1 / 1.6)
    log_probs = found["laplace_temperature"].log_probs
    torch.testing.assert_close(log_probs.exp(), powered / powered.sum(-1, keepdim=True), rtol=1e-10, atol=1e-14)
    assert torch.equal(log_probs == -torch.inf, torch.cat([batch["absent"] for batch in batches]))
    torch.testing.assert_close(found["one"].log_probs, found["laplace_evidence"].log_probs)


def test_the_link_decides_about_the_fit():
    plain = LaplaceTemperature(curvature=RANK3)
    assert LaplaceTemperature(curvature=RANK3, link="probit").fit_options() != plain.fit_options()
    assert LaplaceTemperature(curvature=RANK3, num_samples=7).fit_options() != plain.fit_options()
