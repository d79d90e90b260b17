import math
import warnings

import pytest
import torch
from methods_cases import RANK3, predict
from oracles.models import answer_logits, split, toy_batch, toy_model

from bmoe_lightning.curvature import Curvature
from bmoe_lightning.laplace.predictive import mean_variance
from bmoe_lightning.methods import BatchView, EvidenceTemperature, LaplaceEvidence, fit_methods
from bmoe_lightning.methods.base import scalar
from bmoe_lightning.methods.evidence_temperature import warn_if_far_from_labels
from bmoe_lightning.utils.fit_warnings import FitWarning


def test_divides_the_logits(model, batches):
    view = BatchView(model, answer_logits, batches[0])
    found = predict(EvidenceTemperature(), model, batches[0], {"temperature": scalar(1.7)})
    assert torch.equal(found, (view.logits / 1.7).log_softmax(-1))


def test_is_the_median_variance_of_the_evidence_s_posterior():
    model = toy_model()
    train, inputs = split(toy_batch(num_rows=60, seed=3), 20, 20, 20), [toy_batch(num_rows=112, seed=4)]
    methods = [m(prior_mean="zero", curvature=RANK3) for m in (EvidenceTemperature, LaplaceEvidence)]
    fit = fit_methods(methods, model, answer_logits, train, inputs)
    posterior = fit.served_posterior(RANK3.digest)
    variances = mean_variance(*posterior.logit_covariance(model, answer_logits, inputs[0], centred=True))
    expected = math.sqrt(1 + math.pi / 4 * float(variances.quantile(0.5)))
    assert float(fit.state_of(methods[0])["temperature"]) == pytest.approx(expected, rel=1e-3)
    assert expected > 1.01


def test_needs_the_exact_fisher():
    with pytest.raises(ValueError, match="fisher='exact', got 'mc'"):
        EvidenceTemperature(curvature=Curvature(fisher="mc"))
    with pytest.raises(ValueError, match="fisher='exact', got 'empirical'"):
        EvidenceTemperature().with_defaults(Curvature(fisher="empirical"))


def test_labels_do_not_matter():
    state = {"temperature": scalar(1.7)}
    assert EvidenceTemperature().refit(state, torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64)) is state


def drawn(temperature, count=400):
    """Logits, and labels that ask for a temperature."""
    generator = torch.Generator().manual_seed(0)
    logits = 6 * torch.randn(count, 4, generator=generator, dtype=torch.float64)
    return logits, torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator).squeeze(1)


@pytest.mark.parametrize(
    ("evidence", "wanted", "reason"), [(1.5, 5.0, "label noise or a failure to learn"), (6.0, 1.0, "weights moved")]
)
def test_labels_that_ask_for_another_temperature_are_heard(evidence, wanted, reason):
    with pytest.warns(FitWarning, match=rf"is {evidence:.3g}, but the 400 held-out labels ask for .*{reason}"):
        warn_if_far_from_labels(evidence, *drawn(wanted))


def test_a_few_labels_and_small_differences_say_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_far_from_labels(2.0, *drawn(2.5))
        logits, _ = drawn(1.0, 3)
        warn_if_far_from_labels(1.2, logits, logits.argmax(1))  # the fitted one is at a bound
