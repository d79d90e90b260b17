import pytest
import torch
from methods_cases import RANK3, fitted, predictions
from oracles.models import answer_logits

from bmoe_lightning.curvature import collect_factors
from bmoe_lightning.laplace import LaplacePosterior
from bmoe_lightning.methods import MAP, LaplaceEvidence, LaplaceLPO

PRECISION = torch.tensor([2.0, 2.0], dtype=torch.float64)


@pytest.fixture
def posterior(model, batches):
    return LaplacePosterior(collect_factors(model, answer_logits, batches, rank=3), 2.0)


@pytest.mark.parametrize("kind", [LaplaceEvidence, LaplaceLPO])
@pytest.mark.parametrize("link", ["mc", "isotropic", "probit", "laplace_bridge"])
def test_is_what_the_posterior_predicts(model, batches, posterior, kind, link):
    method = kind(curvature=RANK3, link=link, num_samples=300)
    fit = fitted((method, {"prior_precision": PRECISION}), posterior=posterior, seed=4)
    found = predictions(model, batches, method, fit=fit)[method.name].log_probs
    expected = [posterior.predict(model, answer_logits, b, link, num_samples=300, seed=4) for b in batches]
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-9, atol=1e-12)
    assert torch.equal(found == -torch.inf, torch.cat([batch["absent"] for batch in batches]))


def test_posteriors_with_other_priors_share_one_forward_a_batch(model, batches, posterior):
    calls = []

    def counted(model, batch):
        calls.append(batch)
        return answer_logits(model, batch)

    narrow, wide = (LaplaceEvidence(name=name, curvature=RANK3) for name in ("narrow", "wide"))
    states = [(narrow, {"prior_precision": PRECISION}), (wide, {"prior_precision": PRECISION / 20})]
    fit = fitted(*states, posterior=posterior)
    found = predictions(model, batches, MAP(), narrow, wide, fit=fit, class_logits=counted)
    assert len(calls) == len(batches)
    assert not torch.allclose(found["narrow"].log_probs, found["wide"].log_probs)
    confidence = {name: float(p.log_probs.exp().amax(-1).mean()) for name, p in found.items()}
    assert confidence["wide"] < confidence["narrow"] < confidence["map"]
    other = posterior.with_prior_precision(0.1)
    expected = torch.cat([other.predict(model, answer_logits, batch) for batch in batches])
    torch.testing.assert_close(found["wide"].log_probs, expected, rtol=1e-9, atol=1e-12)


def test_states_its_prior_precision():
    method = LaplaceEvidence(curvature=RANK3)
    assert method.hyperparameters({"prior_precision": PRECISION}) == {"prior_precision": 2.0}
    layered = {"prior_precision": torch.tensor([2.0, 3.0])}
    assert method.hyperparameters(layered) == {"prior_precision_0": 2.0, "prior_precision_1": 3.0}


@pytest.mark.parametrize("kind", [LaplaceEvidence, LaplaceLPO])
def test_refuses_bad_options_early(kind):
    with pytest.raises(ValueError, match="unknown link 'softmax'; valid are mc"):
        kind(link="softmax")
    with pytest.raises(ValueError, match="num_samples"):
        kind(num_samples=0)
    with pytest.raises(ValueError, match="unknown scope 'expert'; valid are global, layer"):
        kind(scope="expert")
    with pytest.raises(RuntimeError, match="has no curvature yet"):
        _ = kind().spec


def test_refuses_another_prior_mean():
    with pytest.raises(ValueError, match="unknown prior_mean 'ones'"):
        LaplaceEvidence(prior_mean="ones")


@pytest.mark.parametrize("kind", [LaplaceEvidence, LaplaceLPO])
def test_link_and_samples_do_not_touch_the_fit(kind):
    plain = kind(curvature=RANK3)
    assert kind(curvature=RANK3, link="probit", num_samples=7).fit_options() == plain.fit_options()
    assert kind(curvature=RANK3, scope="global").fit_options() != plain.fit_options()
