import pytest
import torch
from oracles.models import answer_logits

from bmoe_lightning.curvature import collect_factors
from bmoe_lightning.laplace import LaplacePosterior
from bmoe_lightning.methods import MAP, BatchView, LaplaceMethod, LaplaceTemperature, evaluate


@pytest.fixture
def posterior(model, batches):
    return LaplacePosterior(collect_factors(model, answer_logits, batches, rank=3), 2.0)


@pytest.mark.parametrize("link", ["mc", "isotropic", "probit", "laplace_bridge"])
def test_is_what_the_posterior_predicts(model, batches, posterior, link):
    method = LaplaceMethod(posterior, "ours", "Ours", link, num_samples=300, seed=4)
    found = evaluate([method], model, answer_logits, batches, posterior)["ours"].log_probs
    expected = [posterior.predict(model, answer_logits, b, link, num_samples=300, seed=4) for b in batches]
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-9, atol=1e-12)
    assert torch.equal(found == -torch.inf, torch.cat([batch["absent"] for batch in batches]))


def test_posteriors_with_other_priors_share_one_forward_a_batch(model, batches, posterior):
    calls = []

    def counted(model, batch):
        calls.append(batch)
        return answer_logits(model, batch)

    wide = posterior.with_prior_precision(0.1)
    methods = [MAP(), LaplaceMethod(posterior, "narrow", "narrow"), LaplaceMethod(wide, "wide", "wide")]
    found = evaluate(methods, model, counted, batches, posterior)
    assert len(calls) == len(batches)
    assert not torch.allclose(found["narrow"].log_probs, found["wide"].log_probs)
    confidence = {name: float(p.log_probs.exp().amax(-1).mean()) for name, p in found.items()}
    assert confidence["wide"] < confidence["narrow"] < confidence["map"]
    expected = torch.cat([wide.predict(model, answer_logits, batch) for batch in batches])
    torch.testing.assert_close(found["wide"].log_probs, expected, rtol=1e-9, atol=1e-12)


def test_a_temperature_goes_on_top_of_the_probabilities(model, batches, posterior):
    plain = LaplaceMethod(posterior, num_samples=200)
    view = BatchView(model, answer_logits, batches[0], posterior)
    probs = plain.log_probs(view).exp()
    powered = probs ** (1 / 1.6)
    found = LaplaceTemperature(posterior, 1.6, num_samples=200).log_probs(view)
    torch.testing.assert_close(found.exp(), powered / powered.sum(-1, keepdim=True), rtol=1e-10, atol=1e-14)
    assert torch.equal(found == -torch.inf, batches[0]["absent"])
    torch.testing.assert_close(
        LaplaceTemperature(posterior, 1.0, num_samples=200).log_probs(view), plain.log_probs(view)
    )


def test_states_its_prior_precision(posterior):
    assert LaplaceMethod(posterior).hyperparameters() == {"prior_precision": 2.0}
    layered = posterior.with_prior_precision(torch.tensor([2.0, 3.0]))
    expected = {"prior_precision_0": 2.0, "prior_precision_1": 3.0}
    assert LaplaceMethod(layered).hyperparameters() == expected
    assert LaplaceTemperature(layered, 1.5).hyperparameters() == {**expected, "temperature": 1.5}


def test_refuses_bad_arguments_early(model, batches, posterior):
    with pytest.raises(ValueError, match="unknown link 'softmax'; valid are mc"):
        LaplaceMethod(posterior, link="softmax")
    with pytest.raises(ValueError, match="num_samples"):
        LaplaceMethod(posterior, num_samples=0)
    with pytest.raises(ValueError, match="positive and finite"):
        LaplaceTemperature(posterior, 0.0)
    with pytest.raises(RuntimeError, match="none has been fitted"):
        LaplaceMethod(posterior).log_probs(BatchView(model, answer_logits, batches[0]))
